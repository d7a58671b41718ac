"""Modules: thin wrappers of the ops that hold a packed weight and an adapter."""

from loftq_kernels.nn.base import QuantLoRAModule
from loftq_kernels.nn.conv import QuantLoRAConv1d, QuantLoRAConv2d
from loftq_kernels.nn.embedding import QuantLoRAEmbedding
from loftq_kernels.nn.group import QuantLoRALinearGroup
from loftq_kernels.nn.linear import QuantLoRALinear

__all__ = [
    "QuantLoRAConv1d",
    "QuantLoRAConv2d",
    "QuantLoRAEmbedding",
    "QuantLoRALinear",
    "QuantLoRALinearGroup",
    "QuantLoRAModule",
]
