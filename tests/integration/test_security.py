"""Attacks that need a server: each is what a stranger, or a hostile server, would try."""
