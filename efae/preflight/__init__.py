"""Checks before work starts: of the driver's machine, of every node and of the cluster."""
