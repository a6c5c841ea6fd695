"""Estimates before a run: shapes, FLOPs, memory, hours."""
