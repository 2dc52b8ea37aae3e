"""A flow model of latents: its network, its loss, and sampling from it."""
