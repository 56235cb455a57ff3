"""commit_ against the eager pipeline and the time that reading the logits takes.

python benchmarks/bench_commit.py [options of `nld bench kernels`, see --help]
"""

from nld_cuda.bench.runner import main

if __name__ == "__main__":
    main("commit")
