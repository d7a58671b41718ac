"""transformers' Trainer: checkpoints that hold what is trained alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from loftq_kernels.nn.wrappers import unwrapped


@contextlib.contextmanager
def exclude_frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Inside, ``model.save_pretrained`` writes no frozen parameter, and so do the checkpoints of a Trainer::

        with exclude_frozen_parameters(model):
            trainer.train(resume_from_checkpoint=True)

    The checkpoints hold the adapters with their scaling, what ``modules_to_save`` names, and buffers. A Trainer resumes
    from them and loads the best of them with the same model, whose frozen parameters it leaves as they are;
    ``from_pretrained`` refuses them, for they hold no base. Afterwards `save_pretrained` writes everything again, and
    `save_adapter` the adapter for PEFT. The name is that of DeepSpeed's option.

    It is transformers' own set of keys to leave out, which Trainer knows, too. Raises TypeError for a model that is
    none of transformers': a PeftModel saves its adapters alone without this.
    """
    model = unwrapped(model)
    if "_keys_to_ignore_on_save" not in vars(model):
        raise TypeError(
            f"{type(model).__name__} is no model of transformers (a PeftModel writes its adapters alone by itself)"
        )
    before = model._keys_to_ignore_on_save
    frozen = {name for name, own in model.named_parameters(remove_duplicate=False) if not own.requires_grad}
    model._keys_to_ignore_on_save = {*before, *frozen}
    try:
        yield
    finally:
        model._keys_to_ignore_on_save = before
