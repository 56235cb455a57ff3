"""Tri-mode language models: autoregressive, diffusion, self-speculation; one set of weights."""

# isort: off
from nld_cuda import _library as _library  # first: it says plainly when torch is missing

# isort: on
from nld_cuda import ops as ops
from nld_cuda import parallel as parallel
from nld_cuda import reference as reference
from nld_cuda.api import NLDModel as NLDModel
from nld_cuda.api import load as load
from nld_cuda.chat import Chat as Chat
from nld_cuda.chat_template import ChatTemplate as ChatTemplate
from nld_cuda.decode.calibrate import calibrate_kv as calibrate_kv
from nld_cuda.decode.generate import GenerateResult as GenerateResult
from nld_cuda.decode.generate import generate as generate
from nld_cuda.decode.session import Session as Session
from nld_cuda.decode.stats import DecodeStats as DecodeStats
from nld_cuda.decode.stream import StreamEvent as StreamEvent
from nld_cuda.decode.stream import stream as stream
from nld_cuda.model.transformer import KVScales as KVScales
from nld_cuda.version import __version__ as __version__
