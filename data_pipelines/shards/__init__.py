"""The format of a shard set: tars, their members, their index, and latents in them."""
