"""Text becomes tokens, and tokens batches."""
