"""Implementations by others that the benchmarks run beside ours. One file a library."""
