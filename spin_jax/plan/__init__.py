"""Whether a run fits a machine, and how long it takes, before the machine is rented."""
