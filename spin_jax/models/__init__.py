"""The model: its architecture, its layers, its parameters, and checkpoints of it."""
