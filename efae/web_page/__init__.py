"""A static page that flips latents in a browser."""
