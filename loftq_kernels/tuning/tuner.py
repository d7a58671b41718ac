"""The loop of `rilq_tune`: its options and result, its losses, Adam on float32 copies of the adapters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from loftq_kernels import arguments
from loftq_kernels.nn import QuantLoRAModule
from loftq_kernels.nn.adapters import quantized_layers
from loftq_kernels.progress import progress_bar
from loftq_kernels.tuning import state
from loftq_kernels.tuning.state import RilqPoint, RilqProgress
from loftq_kernels.tuning.teacher import Batch, batch_key, final_states, fingerprint, to_device


@dataclass(frozen=True)
class RilqConfig:
    """How `rilq_tune` optimizes. The defaults are those of the authors' code, whose batches are single sequences.

    Attributes:
        weight: of the discrepancy, 0 .. 1; the cross-entropy gets the rest.
        lr: constant learning rate of Adam. Adapters with small factors, such as group means have, tolerate more.
        steps: updates at most.
        accumulate: batches per update.
        validate_every: updates from one validation to the next; state is saved then.
        patience: validations without a new best after which tuning stops.
        validation_share: of the batches, held out (the last ones) when no ``validation`` is given.
        gradient_checkpointing: keep only the inputs of the model's blocks and compute the rest again in the backward.
        seed: of the order of the batches, new in each epoch.

    Raises ValueError, with the value, for fields out of range.
    """

    weight: float = 0.5
    lr: float = 1e-4
    steps: int = 1000
    accumulate: int = 8
    validate_every: int = 25
    patience: int = 5
    validation_share: float = 0.2
    gradient_checkpointing: bool = True
    seed: int = 0

    def __post_init__(self):
        weight, share = arguments.plain_number(self.weight), arguments.plain_number(self.validation_share)
        if weight is None or not 0 <= weight <= 1:
            raise ValueError(f"weight={self.weight!r} is outside 0..1")
        if share is None or not 0 < share < 1:
            raise ValueError(f"validation_share={self.validation_share!r} is outside 0..1")
        plain = {"weight": weight, "validation_share": share, "lr": arguments.number("lr", self.lr, above=0)}
        plain["gradient_checkpointing"] = arguments.flag("gradient_checkpointing", self.gradient_checkpointing)
        plain["seed"] = arguments.whole_number("seed", self.seed, -(2**63), 2**64 - 1)
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        for name in ("steps", "accumulate", "validate_every", "patience"):
            object.__setattr__(self, name, arguments.whole_number(name, getattr(self, name), 1))


@dataclass
class RilqResult:
    """What `rilq_tune` did. ``train`` holds means over an update's batches, ``validation`` means over all held out.

    ``best_step`` is the update whose adapters the model holds now, 0 for those it came with; ``stopped`` says why there
    were no more: "steps" or "patience".
    """

    best_step: int
    best_loss: float
    start_loss: float
    steps: int
    stopped: str
    train: list[RilqPoint] = field(default_factory=list)
    validation: list[RilqPoint] = field(default_factory=list)

    def plot(self, path: str | Path) -> None:
        """Write the loss curves as a PNG; needs matplotlib (ImportError says how to get it)."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("the loss curve needs: pip install matplotlib") from error
        figure = Figure(figsize=(7, 4), layout="constrained")
        axis = figure.subplots()
        for label, points in (("training", self.train), ("held out", self.validation)):
            axis.plot([p.step for p in points], [p.loss for p in points], label=label)
        axis.axvline(self.best_step, color="black", linewidth=0.8, linestyle="--", label=f"best: {self.best_step}")
        axis.set(title="RILQ", xlabel="update", ylabel="loss")
        axis.legend()
        figure.savefig(path, format="png", dpi=120)


def discrepancy(states: Tensor, expected: Tensor, batch: Batch) -> Tensor:
    """mean (h - h_teacher)^2 over the tokens that the mask of the batch does not hide, in float32 or better."""
    if states.shape != expected.shape:
        raise ValueError(
            f"the model's hidden states have shape {tuple(states.shape)}, the teacher's {tuple(expected.shape)}"
        )
    wide = torch.promote_types(states.dtype, torch.float32)
    squares = (states.to(wide) - expected.to(states.device, wide)).square()
    mask = None
    if isinstance(batch, Mapping):  # The final states of an encoder-decoder model are its decoder's.
        mask = batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")
    if mask is None or mask.shape != squares.shape[:-1]:
        return squares.mean()
    return squares[mask.bool()].mean()


def next_token_loss(logits: Tensor | None, batch: Batch) -> Tensor:
    """Cross-entropy of token t + 1 given logits [B, T, V] at t; labels are the input ids unless the batch has some."""
    labels = _labels(batch)
    if logits is None or labels is None:
        what = "logits" if logits is None else "token ids"
        raise ValueError(f"there are no {what} for the cross-entropy: weight=1 tunes on the hidden states alone")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, the logits {tuple(logits.shape)}")
    wide = torch.promote_types(logits.dtype, torch.float32)
    return cross_entropy(logits[..., :-1, :].flatten(0, -2).to(wide), labels[..., 1:].flatten())


def _labels(batch: Batch) -> Tensor | None:
    if isinstance(batch, Tensor):
        return None if batch.is_floating_point() else batch
    labels = batch.get("labels", batch.get("input_ids"))
    mask = batch.get("attention_mask")
    if labels is None or "labels" in batch or mask is None or mask.shape != labels.shape:
        return labels
    return labels.masked_fill(mask == 0, -100)  # cross_entropy ignores -100.


def adapted_layers(model: nn.Module) -> dict[str, QuantLoRAModule]:
    """The quantized layers that have an adapter, disabled or not."""
    return {name: layer for name, layer in quantized_layers(model).items() if layer.lora_A is not None}


class Tuner:
    """The loop. Adam works on float32 copies: updates of 1e-4 would be lost in the bfloat16 of an adapter."""

    def __init__(self, model, adapters, source, train, held_out, cfg: RilqConfig, hidden, state_dir):
        self.model, self.adapters, self.source = model, adapters, source
        self.train, self.held_out, self.cfg, self.hidden = train, held_out, cfg, hidden
        self.device = next(iter(adapters.values())).device
        self.masters = {
            name: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for name, parameter in adapters.items()
        }
        self.best = {name: master.clone() for name, master in self.masters.items()}
        self.optimizer = torch.optim.Adam(self.masters.values(), lr=cfg.lr)
        self.state_dir = None if state_dir is None else Path(state_dir)
        self.done = RilqProgress(held=[self._key(self.best)])
        if self.state_dir is not None:
            self._resume()

    def run(self, progress: bool | Callable[[RilqPoint], None] | None) -> RilqResult:
        cfg, shown = self.cfg, False if callable(progress) else progress
        try:
            self._install(self.masters)
            if not self.done.validation:
                self._validate()
            with progress_bar(total=cfg.steps, initial=self.done.step, desc="rilq", unit="step", show=shown) as bar:
                while self.done.step < cfg.steps and self.done.waiting < cfg.patience:
                    point = self._update()
                    if self.done.step % cfg.validate_every == 0 or self.done.step == cfg.steps:
                        self._validate()
                    bar.update()
                    bar.set_postfix(loss=f"{point.loss:.4f}", best=f"{self.done.best_loss:.4f}")
                    if callable(progress):
                        progress(point)
        finally:
            self._install(self.best)
        done = self.done
        return RilqResult(
            best_step=done.best_step,
            best_loss=done.best_loss,
            start_loss=done.validation[0].loss,
            steps=done.step,
            stopped="patience" if done.waiting >= cfg.patience else "steps",
            train=done.train,
            validation=done.validation,
        )

    @torch.no_grad()
    def _install(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.adapters.items():
            parameter.copy_(values[name])

    def _losses(self, batch: Batch) -> tuple[Tensor, RilqPoint]:
        """The loss of one batch and its parts. A part of weight 0 is not computed and counts as 0."""
        batch, weight = to_device(batch, self.device), self.cfg.weight
        states, logits = final_states(self.model, batch, self.hidden)
        zero = states.new_zeros(())
        mse = discrepancy(states, self.source.states(batch), batch) if weight > 0 else zero
        ce = next_token_loss(logits, batch) if weight < 1 else zero
        loss = weight * mse + (1 - weight) * ce
        point = RilqPoint(self.done.step, loss.item(), mse.item(), ce.item())
        if not math.isfinite(point.loss):
            raise FloatingPointError(
                f"update {self.done.step}: the loss is {point.loss} (discrepancy {point.mse}, cross-entropy {point.ce})"
            )
        return loss, point

    def _update(self) -> RilqPoint:
        count, points = self.cfg.accumulate, []
        for i in range(self.done.step * count, (self.done.step + 1) * count):
            loss, point = self._losses(self._batch(i))
            (loss / count).backward()
            points.append(point)
        for name, parameter in self.adapters.items():
            self.masters[name].grad = None if parameter.grad is None else parameter.grad.to(self.masters[name].dtype)
            parameter.grad = None
        self.optimizer.step()
        self._install(self.masters)
        self.done.step += 1
        self.done.train.append(_mean(points, self.done.step))
        return self.done.train[-1]

    def _batch(self, position: int) -> Batch:
        """The batch at a position. The order of each epoch follows from the seed, so resuming needs only the seed."""
        epoch, index = divmod(position, len(self.train))
        generator = torch.Generator().manual_seed(self.cfg.seed * 1_000_003 + epoch)
        return self.train[int(torch.randperm(len(self.train), generator=generator)[index])]

    @torch.no_grad()
    def _validate(self) -> None:
        point = _mean([self._losses(batch)[1] for batch in self.held_out], self.done.step)
        done, best = self._judged(point)
        if self.state_dir is not None:
            stored, stored_best = done, best
            if point.step % self.cfg.validate_every:
                stored, stored_best = dataclasses.replace(self.done, end=point, held=done.held), self.best
            state.save(self.state_dir, self._settings(), stored, self._tensors(stored_best))
        self.done, self.best = done, best  # Not before the save, which may fail and leave the older state.

    def _judged(self, point: RilqPoint) -> tuple[RilqProgress, dict[str, Tensor]]:
        """Progress and best adapters after a validation of the masters."""
        done = dataclasses.replace(self.done, validation=[*self.done.validation, point], end=None)
        if not point.loss < done.best_loss:
            return dataclasses.replace(done, waiting=done.waiting + 1), self.best
        held = done.held if (key := self._key(self.masters)) in done.held else [*done.held, key]
        done = dataclasses.replace(done, best_loss=point.loss, best_step=point.step, waiting=0, held=held)
        return done, {name: master.detach().clone() for name, master in self.masters.items()}

    def _key(self, values: Mapping[str, Tensor]) -> str:
        """Hash of the adapters in the model's dtype; only used to match saved states."""
        if self.state_dir is None:
            return ""
        return batch_key({name: values[name].to(parameter.dtype) for name, parameter in self.adapters.items()})

    def _settings(self) -> dict:
        """The settings that a saved state belongs to, without the number of updates and what changes no result."""
        free = ("steps", "gradient_checkpointing", "validation_share")
        layers = adapted_layers(self.model)
        settings = {k: v for k, v in dataclasses.asdict(self.cfg).items() if k not in free}
        return settings | {
            "batches": [batch_key(batch) for batch in self.train],
            "validation": [batch_key(batch) for batch in self.held_out],
            "teacher": self.source.key,
            "model": fingerprint(self.model, exclude=self.adapters.values()),
            "adapters": {name: list(parameter.shape) for name, parameter in self.adapters.items()},
            "adapter": {name: layer.adapter for name, layer in layers.items()},
            "scaling": {name: float(layer.scaling) for name, layer in layers.items()},
            "adapter_enabled": {name: layer.adapter_enabled for name, layer in layers.items()},
        }

    def _tensors(self, best: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = {"rng": torch.get_rng_state()}
        for name, master in self.masters.items():
            tensors |= {f"adapter.{name}": master, f"best.{name}": best[name]}
            for key, value in self.optimizer.state.get(master, {}).items():
                tensors[f"{key}.{name}"] = value
        return tensors

    def _resume(self) -> None:
        stored = state.load(self.state_dir, self._settings())
        if stored is None:
            return
        done, tensors = stored
        if self.done.held[0] not in done.held:
            raise ValueError(
                f"{self.state_dir}: the model's adapters differ from those that the state was made from; give it the "
                "model that the run began with or left, or another folder"
            )
        self.done = done
        torch.set_rng_state(tensors["rng"])
        for name, master in self.masters.items():
            master.copy_(tensors[f"adapter.{name}"])
            self.best[name].copy_(tensors[f"best.{name}"])
            if f"step.{name}" in tensors:
                self.optimizer.state[master] = {
                    key: tensors[f"{key}.{name}"].to("cpu" if key == "step" else master.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        if done.end is not None and done.step >= self.cfg.steps:
            self.done, self.best = self._judged(done.end)
        self.done.end = None  # A run without a break would not have validated there.


def _mean(points: list[RilqPoint], step: int) -> RilqPoint:
    return RilqPoint(step, *(math.fsum(values) / len(points) for values in zip(*(p[1:] for p in points), strict=True)))
