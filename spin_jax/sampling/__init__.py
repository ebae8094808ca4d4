"""Answers to prompts: the next token, slots in progress, continuous batching."""
