"""Ways to choose a quantized weight and its adapter; one file a method."""

from loftq_kernels.initializers.aser import aser_init
from loftq_kernels.initializers.eora import eora_init
from loftq_kernels.initializers.loftq import loftq_init, loftq_init_batch
from loftq_kernels.initializers.qalora import qalora_init
from loftq_kernels.initializers.qlora import qlora_init
from loftq_kernels.initializers.registry import initialize, initializer_names, needs_statistics, takes_statistics
from loftq_kernels.initializers.result import AdapterInit
from loftq_kernels.initializers.statistics import InputStatistics
from loftq_kernels.initializers.weighted import weighted_low_rank

__all__ = [
    "AdapterInit",
    "InputStatistics",
    "aser_init",
    "eora_init",
    "initialize",
    "initializer_names",
    "loftq_init",
    "loftq_init_batch",
    "needs_statistics",
    "qalora_init",
    "qlora_init",
    "takes_statistics",
    "weighted_low_rank",
]
