"""The NLD transformer: configuration, weights, forward pass."""

from nld_cuda.model.checkpoint import load_model as load_model
from nld_cuda.model.config import ModelConfig as ModelConfig
from nld_cuda.model.transformer import NLDModel as NLDModel
