"""Tri-mode language models: autoregressive, block diffusion, self-speculation; one set of weights."""

from nld_cuda import (
    _library as _library,
)  # first: says plainly when torch or the library is missing
from nld_cuda import ops as ops

__version__ = "0.1.0"
