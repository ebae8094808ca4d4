"""Training: packed batches, log-probs, the jitted step and the loop over it."""
