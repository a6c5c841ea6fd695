"""Hugging Face models in and out: found, loaded, built, relabelled, with layers of their own widths."""
