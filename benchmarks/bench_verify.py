"""verify_ against the eager pipeline with its host-side slicing.

python benchmarks/bench_verify.py [options of `nld bench kernels`, see --help]
"""

from nld_cuda.bench.runner import main

if __name__ == "__main__":
    main("verify")
