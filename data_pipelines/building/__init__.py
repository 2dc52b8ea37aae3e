"""Sources -> shards: what the four commands are made of."""
