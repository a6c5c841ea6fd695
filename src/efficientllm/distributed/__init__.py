"""Ranks and devices: the only room that imports torch.distributed."""
