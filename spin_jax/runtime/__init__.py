"""What a run needs of the machine: meshes, processes, signals, the terminal, users' functions."""
