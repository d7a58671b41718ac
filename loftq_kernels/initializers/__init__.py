"""Ways to choose a quantized weight and its adapter; one file a method."""

from loftq_kernels.initializers.loftq import loftq_init, loftq_init_batch
from loftq_kernels.initializers.qalora import qalora_init
from loftq_kernels.initializers.qlora import qlora_init
from loftq_kernels.initializers.registry import initialize, initializer_names
from loftq_kernels.initializers.result import AdapterInit

__all__ = [
    "AdapterInit",
    "initialize",
    "initializer_names",
    "loftq_init",
    "loftq_init_batch",
    "qalora_init",
    "qlora_init",
]
