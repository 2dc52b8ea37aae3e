"""Batches from shards, in the order of an epoch plan that is a pure function."""
