"""Checkpoints in storage, and the run folder that holds them."""
