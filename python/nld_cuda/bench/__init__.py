"""The benchmark suite behind `nld bench kernels`: every op against its baselines and the roofs."""
