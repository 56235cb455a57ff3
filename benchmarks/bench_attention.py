"""block_attention against SDPA, FlexAttention and what else is installed.

python benchmarks/bench_attention.py [options of `nld bench kernels`, see --help]
"""

from nld_cuda.bench.runner import main

if __name__ == "__main__":
    main("attention")
