"""Turns the rows of a dataset into token ids: sources, conversations, examples and pairs."""
