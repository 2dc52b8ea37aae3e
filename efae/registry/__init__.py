"""Registered models: pull, register and promote them."""
