"""Here until everybody imports nld_cuda.bench.traffic."""

import sys

from nld_cuda.bench import traffic

sys.modules[__name__] = traffic
