"""Laws, speed and memory on one GPU; `python -m benchmarks.gpu --help`."""
