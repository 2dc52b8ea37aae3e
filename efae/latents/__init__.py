"""Images -> latents, once, on a Ray cluster: shard sets for those who train on latents."""
