"""What a shard set is: tars, their members, their index, and latents in them."""
