"""`LayerState`: what a quantized layer's state_dict holds beside its tensors, and which one it refuses to load."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from loftq_kernels.formats import get_format
from loftq_kernels.ops.checks import is_sharded
from loftq_kernels.ops.constant import loading, restore_constants

PACKED = ("codes", "scale", "offset", "codebook")
_STATE = "_extra_state"  # nn.Module's key of what `get_extra_state` returns
_warned: list[list[str] | None] = [None]  # the missing keys of the load that warned last: one list for all its layers


class LayerState(nn.Module):
    """What `QuantLoRAModule` saves and loads; it provides the tensors."""

    def get_extra_state(self) -> Tensor:
        """What tensors do not tell: float64 [scaling, 1 if the adapter is enabled else 0, in_features], on the CPU."""
        values = self.scaling, float(self.adapter_enabled), float(self._columns)
        return torch.tensor(values, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what `get_extra_state` returned, now or before it had in_features. Raises ValueError for others."""
        values = state.flatten().tolist() if isinstance(state, Tensor) and state.numel() in (2, 3) else (0.0, None)
        if not 1e-30 < values[0] < 1e30 or values[1] not in (0.0, 1.0):
            raise ValueError(f"_extra_state must be [scaling, adapter_enabled, in_features], got {state!r}")
        if message := self._other_width(state):
            raise ValueError(message)
        self.scaling, self.adapter_enabled = values[0], bool(values[1])

    def _other_width(self, state: object) -> str | None:
        """What keeps an extra state from being this layer's: rows of 63 columns are packed as wide as rows of 64."""
        width = state.flatten()[2].item() if isinstance(state, Tensor) and state.numel() == 3 else self._columns
        return None if width == self._columns else f"in_features is {width:g}, this layer's is {self._columns}"

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.lora_A is None:
            destination.pop(prefix + _STATE, None)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Refuse a checkpoint of another format or width: shapes alone cannot tell nf2 from uniform2, or 63 from 64."""
        wrong = [message for name in PACKED if (message := self._misfit(name, state_dict.get(prefix + name)))]
        wrong += [message for message in [self._other_width(state_dict.get(prefix + _STATE))] if message]
        error_msgs.extend(prefix + message for message in wrong)
        if wrong:
            return
        with loading():
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        restore_constants(self, PACKED)
        if prefix + _STATE not in state_dict:
            self._note_missing_state(prefix, missing_keys, prefix + "lora_A" in state_dict)

    def _misfit(self, name: str, stored: Tensor | None) -> str | None:
        """What keeps a stored tensor of the packed weight from being this layer's; None where nothing does."""
        own = getattr(self, name)
        if stored is None or own is None:
            return None
        if stored.dtype != own.dtype:  # Copying would round codes, or the scales that they were chosen against.
            return f"{name} is {stored.dtype}, this layer stores {own.dtype}"
        if name != "codebook" or stored.is_meta:
            return None
        if is_sharded(stored) and is_sharded(own):
            stored, expected = stored.to_local(), own.to_local()
        else:
            expected = get_format(self.format.name).codebook(stored.device)
        if stored.shape == expected.shape and torch.equal(stored, expected):
            return None
        return f"{name} is not that of format {self.format.name}: {stored.flatten()[:4].tolist()}..."

    def _note_missing_state(self, prefix: str, missing_keys: list[str], has_adapter: bool) -> None:
        """State dicts of earlier versions lack it: what the layer has stays, which is right for the same config.

        So do those without the layer's adapter, such as PEFT's of its own adapters alone, about which nothing is said.
        """
        if prefix + _STATE in missing_keys:
            missing_keys.remove(prefix + _STATE)
        if not has_adapter or (self.scaling == 1 and self.adapter_enabled) or _warned[0] is missing_keys:
            return
        _warned[0] = missing_keys
        warnings.warn(
            f"the state_dict does not say what the adapter of {prefix.rstrip('.') or 'the layer'} is scaled by: "
            f"it keeps scaling={self.scaling:g}, adapter_enabled={self.adapter_enabled}, and so does every other layer "
            "without this entry",
            stacklevel=2,
        )
