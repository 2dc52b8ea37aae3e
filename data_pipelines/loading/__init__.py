"""Shards -> batches, in the order of a plan that is a pure function."""
