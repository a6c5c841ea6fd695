"""Where a model goes: folders, the hub, files for devices, text on a terminal."""
