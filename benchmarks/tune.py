"""Measure what the attention heuristic did not choose, and fit the model of time.

python benchmarks/tune.py [options of `python -m nld_cuda.bench.tune`, see --help]
"""

from nld_cuda.bench.tune import main

if __name__ == "__main__":
    main()
