"""Modules: thin wrappers of the ops that hold a packed weight and an adapter."""

from loftq_kernels.nn.group import QuantLoRALinearGroup
from loftq_kernels.nn.linear import QuantLoRALinear

__all__ = ["QuantLoRALinear", "QuantLoRALinearGroup"]
