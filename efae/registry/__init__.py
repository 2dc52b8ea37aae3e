"""Registered models: pulling, registering and promoting them."""
