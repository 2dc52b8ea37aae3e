"""Sweeps: Ray Tune searches the configuration, the latent's representation above all."""
