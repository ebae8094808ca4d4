"""What a run writes and reads: files, sealed folders, checkpoints, metrics, the Hugging Face hub."""
