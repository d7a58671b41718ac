"""transformers: ``from_pretrained`` and ``save_pretrained`` for quantized models, through a quantizer of our own.

`LoftqConfig` is what people give to ``from_pretrained(quantization_config=)`` and what config.json holds;
`LoftqQuantizer` is what transformers calls while it loads and saves. `register` makes both known for quant_method
"loftq", as soon as transformers is imported.

Private names of transformers in use, here, in `quantizer` and in `loading`: ``model._weight_conversions``, which,
empty, keeps ``save_pretrained`` from renaming tensors for the checkpoints of other tools, which know nothing of packed
ones; ``_hf_peft_config_loaded`` and ``_keys_to_ignore_on_save``, which say what it leaves out; ``_is_hf_initialized``,
the mark of tensors that were loaded. `saving` wraps ``save_pretrained``.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.quantizers import auto

from loftq_kernels import hosts
from loftq_kernels.checkpoints import architecture, hosted
from loftq_kernels.checkpoints.native import one_writer, remove_unfinished
from loftq_kernels.checkpoints.quiet import quiet_transformers
from loftq_kernels.integrations.quantizer import LoftqConfig, LoftqQuantizer, adopt_inner
from loftq_kernels.integrations.register import is_older
from loftq_kernels.models.config import QuantConfig
from loftq_kernels.storage import files

_WORKING = "saving"  # of a folder that is being written


def adopt(model: nn.Module, cfg: QuantConfig | None) -> None:
    """Give a model the quantizer and config that ``save_pretrained`` asks for.

    ``model.is_quantized`` stays as it is: transformers, which sets it where it loads a model, then refuses ``.half()``
    and ``.float()``, which our layers can do.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, LoftqQuantizer):
        quantizer = LoftqQuantizer(LoftqConfig.of(cfg), pre_quantized=True)
    elif cfg is not None:
        quantizer.quantization_config.config = cfg
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
    adopt_inner(model, quantizer.quantization_config.config)


class _Transformers:
    """transformers as the package's other parts see it: a `hosts.Host`."""

    def owns(self, model: nn.Module) -> bool:
        return architecture.is_of_transformers(model)

    def adopt(self, model: nn.Module, cfg: QuantConfig | None) -> None:
        adopt(model, cfg)

    def save(self, model: nn.Module, path: Path, max_shard_size: int | str | None) -> None:
        if not isinstance(getattr(model, "hf_quantizer", None), LoftqQuantizer):
            self.adopt(model, None)  # Layers that were put into the model one by one.
        options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        if any(tensor.is_meta for tensor in model.state_dict().values()) and not hasattr(model, "hf_device_map"):
            on_meta = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
            raise ValueError(f"tensors on the meta device have no values to save: {', '.join(on_meta[:5])}")
        with one_writer(model) as writes:
            path.mkdir(parents=True, exist_ok=True)
            remove_unfinished(path)
            with files.working_folder(path, _WORKING) as working:
                with quiet_transformers(), files.full_disk_told(path):
                    model.save_pretrained(working, is_main_process=writes, **options)
                if writes:
                    _publish(working, path)

    def load(self, path: Path, device: torch.device) -> nn.Module:
        name = architecture.architecture_of(path / hosted.CONFIG_NAME)
        try:
            cls = architecture.model_class(name)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; load it by {name}.from_pretrained of your own class") from error
        with quiet_transformers():
            return cls.from_pretrained(path, local_files_only=True, dtype="auto").to(device)


def _publish(working: Path, path: Path) -> None:
    """Move what was written over what was there: tensors first, config.json last, and remove what no longer belongs."""
    written = sorted(working.iterdir(), key=lambda file: (file.name == hosted.CONFIG_NAME, file.suffix == ".json"))
    names = {file.name for file in written}
    superseded = [file for file in hosted.weight_files(path) if file.name not in names]
    for file in written:
        files.sync(file)
        os.replace(file, path / file.name)
    for file in superseded:
        file.unlink(missing_ok=True)


def register() -> None:
    """Make the quantizer known to transformers, and transformers to the package's other parts.

    Raises ImportError for a transformers that is too old.
    """
    if is_older(transformers.__version__, architecture.OLDEST):
        raise ImportError(f"transformers {transformers.__version__} is too old, {architecture.NEEDS_HF}")
    for mapping, cls in (
        (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, LoftqConfig),
        (auto.AUTO_QUANTIZER_MAPPING, LoftqQuantizer),
    ):
        if mapping.get(hosted.METHOD) is not cls:
            mapping.pop(hosted.METHOD, None)  # of a module that was reloaded
    if hosted.METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(hosted.METHOD)(LoftqConfig)
        auto.register_quantizer(hosted.METHOD)(LoftqQuantizer)
    hosts.register("transformers", _Transformers())


register()
