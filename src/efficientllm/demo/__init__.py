"""The main job on an embedded default: a small shipped model, halved on text that every Python carries."""
