"""rope_append_ and compact_ against the eager torch ops that they replace.

python benchmarks/bench_append.py [options of `nld bench kernels`, see --help]
"""

from nld_cuda.bench.runner import main

if __name__ == "__main__":
    main("append")
