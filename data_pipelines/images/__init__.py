"""Image files <-> pixels."""
