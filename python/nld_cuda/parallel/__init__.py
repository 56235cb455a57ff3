"""One model over several processes: tensor parallelism through torch.distributed."""

from nld_cuda.parallel.group import init as init
