"""What must hold before work starts: on the driver, on every node, on the cluster."""
