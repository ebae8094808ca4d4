"""From the rows of a dataset to token ids: sources, conversations, examples, pairs."""
