"""Where a model comes from and where it goes: folders, the hub, text on a terminal."""
