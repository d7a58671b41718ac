"""Models whose weights are quantized to 2-4 bits plus a low-rank adapter, at hardware speed.

y = x @ (codebook[codes] * scale + offset).T  +  scaling * (x @ lora_A.T) @ lora_B.T  +  bias
"""

# ruff: noqa: F405
from __future__ import annotations

import importlib
import re
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "ActivationStatistics",
    "AdapterInit",
    "BitPlan",
    "InputStatistics",
    "LayerConfig",
    "PackedTensor",
    "QuantConfig",
    "QuantLoRAConv1d",
    "QuantLoRAConv2d",
    "QuantLoRAEmbedding",
    "QuantLoRALinear",
    "QuantLoRALinearGroup",
    "QuantizationReport",
    "RilqConfig",
    "RilqResult",
    "aser_init",
    "available_backends",
    "cache_teacher",
    "collect_activations",
    "delete_adapter",
    "eora_init",
    "first_layers",
    "format_names",
    "initializer_names",
    "load_adapter",
    "load_quantized",
    "loftq_init",
    "loftq_init_batch",
    "merge_adapters",
    "plan_bits",
    "qalora_init",
    "qlora_init",
    "qlora_linear",
    "quantize",
    "quantize_model",
    "rilq_tune",
    "save_adapter",
    "save_quantized",
    "set_adapter",
    "solve_plan",
    "train_only_adapters",
    "use_adapters",
    "weighted_low_rank",
]


def _is_the_command() -> bool:
    """Whether this process is ``loftq-kernels`` or ``python -m loftq_kernels``, which has to answer --help at once.

    The program says so itself: a script of any other package may have its name.
    """
    if sys.argv[:1] == ["-m"]:  # Python has not found the module yet; its name stands before the arguments.
        module = sys.orig_argv[-len(sys.argv)]
        return re.fullmatch(rf"(-\w*m)?{__name__}(\.cli)?(\.__main__)?", module) is not None
    return getattr(sys.modules.get(f"_{__name__}_command"), "running", False)


# Everything is imported here, for the ops are registered with torch by it: exported programs and torch.ops need them.
# The command alone begins without torch, and imports the rest when it has understood its arguments.
if TYPE_CHECKING or not _is_the_command():
    from loftq_kernels.public import *  # noqa: F403


_OF_HOSTS = {  # imported when somebody asks for the name
    "LoftqConfig": "loftq_kernels.integrations.transformers",
    "exclude_frozen_parameters": "loftq_kernels.integrations.trainer",
}


def __getattr__(name: str) -> Any:
    """Names whose libraries are imported for them alone; in the process of the command, all others, too."""
    if name in _OF_HOSTS:
        try:
            return getattr(importlib.import_module(_OF_HOSTS[name]), name)
        except ModuleNotFoundError as error:
            raise ImportError(f"{name} needs {error.name}: pip install 'loftq_kernels[hf]'") from error
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from loftq_kernels import public

    globals().update({known: getattr(public, known) for known in __all__})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_OF_HOSTS})
