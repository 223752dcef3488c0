"""Training: loss, optimizer, step, loop, and what a run folder holds."""
