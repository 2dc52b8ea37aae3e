"""Training states in storage: one of them, and the folder of a run."""
