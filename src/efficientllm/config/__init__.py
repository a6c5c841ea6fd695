"""What a run is: its flags, what no run can have, the methods. Imports neither torch nor transformers."""
