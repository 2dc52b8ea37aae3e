"""Sources -> shards: the parts of the four commands."""
