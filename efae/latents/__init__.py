"""From image sets to latent sets, and from a generator of latents to image sets, on Ray."""
