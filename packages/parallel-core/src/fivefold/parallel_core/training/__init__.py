"""Training: text to batches, optimizer, schedule, loop, metrics and progress."""
