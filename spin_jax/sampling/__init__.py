"""Sampling: the next token, the slots of answers in progress, continuous batching."""
