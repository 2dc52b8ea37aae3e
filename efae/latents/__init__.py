"""Encoding of image sets on a Ray cluster, into shard sets for training on latents."""
