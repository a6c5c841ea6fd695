"""What happens to a batch: loss, teacher, optimizer step, metrics."""
