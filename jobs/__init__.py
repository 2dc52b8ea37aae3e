"""Command-line jobs: each parses its arguments, calls one function and sets the exit status."""
