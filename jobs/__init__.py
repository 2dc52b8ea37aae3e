"""What people run: each job parses its command line, calls one function and sets the exit code."""
