"""RILQ (Lee et al., AAAI 2025): tune the adapters of all layers together so that the model's final states match.

    L = weight * mean (h_student - h_teacher)^2  +  (1 - weight) * cross-entropy of the next token

with h the hidden states after the last norm. At 2 bits a layer's own error says little of the model's: through this
loss each adapter makes up for what the others leave, which is why small ranks suffice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from loftq_kernels import rilq_state
from loftq_kernels.convert import adapter_parameters
from loftq_kernels.nn import QuantLoRAModule
from loftq_kernels.progress import tqdm
from loftq_kernels.rilq_state import RilqPoint, RilqProgress
from loftq_kernels.teacher import (
    Batch,
    Hidden,
    LiveTeacher,
    TeacherCache,
    batch_key,
    cache_teacher,
    check_batches,
    final_states,
    fingerprint,
    to_device,
)

Teacher = nn.Module | Callable[[], nn.Module] | str | Path


@dataclass(frozen=True)
class RilqConfig:
    """How `rilq_tune` optimizes. The defaults are those of the authors' code, whose batches are single sequences.

    Attributes:
        weight: of the discrepancy, 0 .. 1; the cross-entropy gets the rest.
        lr: of Adam, constant. Adapters whose factors are small, as of group means, stand a larger one.
        steps: updates at most.
        accumulate: batches an update.
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
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight={self.weight!r} is outside 0..1")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr!r} must be a finite number > 0")
        for name in ("steps", "accumulate", "validate_every", "patience"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer >= 1")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share={self.validation_share!r} is outside 0..1")


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


def rilq_tune(
    model: nn.Module,
    teacher: Teacher,
    batches: Iterable[Batch],
    cfg: RilqConfig | None = None,
    *,
    validation: Iterable[Batch] | None = None,
    hidden: Hidden | None = None,
    cache: str | Path | None = None,
    state_dir: str | Path | None = None,
    progress: bool | Callable[[RilqPoint], None] = True,
    plot: str | Path | None = None,
) -> RilqResult:
    """Tune all adapters of a quantized model, in place, towards the teacher's final hidden states (see the module).

    Gradients run through the packed weights: nothing dense is built. Dropout is off. In the end, also when that is an
    exception, the model holds the adapters of least loss on held-out batches; the initial ones are among them.

    Args:
        model: with adapters from any start (LoftQ, EoRA, zero), of either kind; frozen but for them while this runs.
        teacher: the full-precision model; or a function that loads it, called only if its states are not in ``cache``
            yet and dropped before tuning; or the folder that `cache_teacher` wrote, with which the teacher need never
            be in memory together with the model.
        batches: token ids [B, T], or mappings with ``input_ids`` and, if need be, ``attention_mask`` and ``labels``
            (-100: ignored), or whatever ``hidden`` takes.
        cfg: default `RilqConfig()`.
        validation: held-out batches; None holds out the last of ``batches``.
        hidden: function of (model, batch) that returns final hidden states or (those, logits), for teacher and model
            alike; None knows transformers models and models that return them themselves.
        cache: folder for the teacher's states. Without one a model as teacher computes them anew each time, and those
            of a function go into a temporary folder.
        state_dir: folder for what resuming takes, saved at each validation. A call with the same arguments goes on
            from there and ends with the same bits (``cfg.steps`` may be larger). A finished run is returned at once.
            The model must hold the adapters that the run began with, or those that it was left with.
        progress: True shows a bar on standard error; a function is told of each update.
        plot: where to write the loss curves as a PNG.

    Raises ValueError for empty data, a model without adapters or with all of them disabled, weight < 1 with a
    transformers model that does not predict the next token (encoder-decoder, masked, no head), states of another shape
    than the teacher's, a cache or state that does not belong to these arguments; TypeError for objects of other kinds;
    FloatingPointError, naming the update, when a loss is not finite.
    """
    cfg = cfg or RilqConfig()
    train, held_out = _split(batches, validation, cfg)
    adapters = adapter_parameters(model)
    if not adapters:
        raise ValueError(f"{type(model).__name__} has no adapters: quantize_model with a rank first")
    if not any(layer.has_adapter for layer in _adapted_layers(model).values()):
        raise ValueError(
            "all adapters are disabled, and tuning would change nothing: call enable_adapter of the layers"
        )
    if cfg.weight < 1:
        _check_causal(model)
    with contextlib.ExitStack() as stack:
        source = _teacher(teacher, train + held_out, hidden, cache, stack)
        del teacher  # so that no name here keeps a loaded model alive
        tuner = _Tuner(model, adapters, source, train, held_out, cfg, hidden, state_dir)
        stack.enter_context(_only(adapters, model))
        if cfg.gradient_checkpointing:
            stack.enter_context(_checkpointed(model))
        result = tuner.run(progress)
    if plot is not None:
        result.plot(plot)
    return result


def _adapted_layers(model: nn.Module) -> dict[str, QuantLoRAModule]:
    """The quantized layers that have an adapter, disabled or not."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantLoRAModule) and module.lora_A is not None
    }


def _check_causal(model: nn.Module) -> None:
    """Raise ValueError for a transformers model in which position t does not predict token t + 1."""
    config, can_generate = getattr(model, "config", None), getattr(model, "can_generate", None)
    if config is None or not callable(can_generate):
        return
    reason = None
    if getattr(config, "is_encoder_decoder", False):
        reason = "is an encoder-decoder model, whose decoder inputs are labels shifted already"
    elif not can_generate():
        reason = "has no causal head"
    else:  # heads of BERT's kind: causal only where the config asks for it
        modules = [sys.modules[c.__module__] for c in type(model).__mro__ if c.__module__.startswith("transformers.")]
        masked = any(name.endswith("ForMaskedLM") for module in modules for name in vars(module))
        if masked and not getattr(config, "is_decoder", False):
            reason = "looks at later tokens, too, as its config.is_decoder is not set"
    if reason is not None:
        raise ValueError(
            f"{type(model).__name__} {reason}: there are no logits of a next token for the cross-entropy; weight=1 "
            "tunes on the hidden states alone"
        )


def _split(batches: Iterable[Batch], validation: Iterable[Batch] | None, cfg: RilqConfig) -> tuple[list, list]:
    train = check_batches(batches)
    if validation is not None:
        return train, check_batches(validation, "validation")
    if len(train) < 2:
        raise ValueError("one batch cannot be split into training and held-out ones: give more, or validation=")
    count = min(len(train) - 1, math.ceil(cfg.validation_share * len(train)))
    return train[:-count], train[-count:]


def _teacher(
    teacher: Teacher, batches: list[Batch], hidden: Hidden | None, cache: str | Path | None, stack: contextlib.ExitStack
) -> LiveTeacher | TeacherCache:
    if isinstance(teacher, str | Path):
        if cache is not None and Path(cache) != Path(teacher):
            raise ValueError(f"teacher={str(teacher)!r} is a cache already, but cache={str(cache)!r} names another")
        return TeacherCache(teacher, batches)
    if isinstance(teacher, nn.Module) and cache is None:
        return LiveTeacher(teacher, hidden)
    if not callable(teacher):
        raise TypeError(f"teacher must be a model, a function that loads one, or a folder; got {teacher!r}")
    if cache is None:
        cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="loftq-teacher-"))
    cache_teacher(teacher, batches, cache, hidden=hidden, progress=False)
    return TeacherCache(cache, batches)


@contextlib.contextmanager
def _only(adapters: Mapping[str, nn.Parameter], model: nn.Module) -> Iterator[None]:
    """Gradients for the adapters alone and no dropout, for a while."""
    learning = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    chosen = {id(parameter) for parameter in adapters.values()}
    try:
        model.eval()
        for parameter in learning:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, learns in learning.items():
            parameter.requires_grad_(learns)
        for parameter in adapters.values():
            parameter.grad = None
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Recompute the model's blocks in the backward. Not by transformers' own switch, which works in training mode only:
    that would turn dropout on."""
    blocks = _blocks(model)

    def recomputed(forward: Callable) -> Callable:
        def run(*args, **kwargs):
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        return run

    try:
        for block in blocks:
            block.forward = recomputed(block.forward)  # an attribute of the instance, which hides the method
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The modules of transformers that support it; else those of the longest `nn.ModuleList` with quantized layers."""
    marked = [m for m in model.modules() if any(c.__name__ == "GradientCheckpointingLayer" for c in type(m).__mro__)]
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and adapter_parameters(m)]
    blocks = marked or max(lists, key=len, default=())
    return [block for block in blocks if "forward" not in block.__dict__]  # someone else's, which must stay


def discrepancy(states: Tensor, expected: Tensor, batch: Batch) -> Tensor:
    """mean (h - h_teacher)^2 over the tokens that the mask of the batch does not hide, in float32 or better."""
    if states.shape != expected.shape:
        raise ValueError(
            f"the model's hidden states have shape {tuple(states.shape)}, the teacher's {tuple(expected.shape)}"
        )
    wide = torch.promote_types(states.dtype, torch.float32)
    squares = (states.to(wide) - expected.to(states.device, wide)).square()
    mask = None
    if isinstance(batch, Mapping):  # of an encoder-decoder model the final states are the decoder's
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
    return labels.masked_fill(mask == 0, -100)  # what cross_entropy ignores


class _Tuner:
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

    def run(self, progress: bool | Callable[[RilqPoint], None]) -> RilqResult:
        cfg = self.cfg
        try:
            self._install(self.masters)
            if not self.done.validation:
                self._validate()
            with tqdm(total=cfg.steps, initial=self.done.step, desc="rilq", disable=progress is not True) as bar:
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
        """Each epoch in an order of its own that follows from the seed, so that a resumed run needs no more than it."""
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
            rilq_state.save(self.state_dir, self._settings(), stored, self._tensors(stored_best))
        self.done, self.best = done, best  # after the save: if that fails the model is left as the older state knows it

    def _judged(self, point: RilqPoint) -> tuple[RilqProgress, dict[str, Tensor]]:
        """Progress and best adapters after a validation of the masters."""
        done = dataclasses.replace(self.done, validation=[*self.done.validation, point], end=None)
        if not point.loss < done.best_loss:
            return dataclasses.replace(done, waiting=done.waiting + 1), self.best
        held = done.held if (key := self._key(self.masters)) in done.held else [*done.held, key]
        done = dataclasses.replace(done, best_loss=point.loss, best_step=point.step, waiting=0, held=held)
        return done, {name: master.detach().clone() for name, master in self.masters.items()}

    def _key(self, values: Mapping[str, Tensor]) -> str:
        """Hash of adapters as the model holds them, which only states are checked by."""
        if self.state_dir is None:
            return ""
        return batch_key({name: values[name].to(parameter.dtype) for name, parameter in self.adapters.items()})

    def _settings(self) -> dict:
        """What a saved state belongs to. Not the number of updates, which may grow, nor what changes no result."""
        free = ("steps", "gradient_checkpointing", "validation_share")
        layers = _adapted_layers(self.model)
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
        stored = rilq_state.load(self.state_dir, self._settings())
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
        self.done.end = None  # of a run that goes on: one without a break would not have validated there


def _mean(points: list[RilqPoint], step: int) -> RilqPoint:
    return RilqPoint(step, *(math.fsum(values) / len(points) for values in zip(*(p[1:] for p in points), strict=True)))
