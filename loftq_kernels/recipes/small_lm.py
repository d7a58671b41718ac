"""A byte-level language model that a CPU trains in a minute or two, on text that every Python install carries.

``python -m loftq_kernels.recipes.small_lm FOLDER`` trains one and writes it as a Llama of transformers.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

from loftq_kernels.progress import progress_bar

BYTES = 256  # the vocabulary
CONTEXT = 128
_CODE_BYTES = 1_500_000  # Bytes of the standard library's sources, a third of them.
_HELD_OUT = 0.1  # The share of a text that is held out, at its end.
_WINDOWS = 96  # Windows of held-out text in a measurement of perplexity.


class Output(NamedTuple):
    """Of a model: final states, which RILQ compares, and logits under the name that models of transformers have."""

    hidden: Tensor  # after the last norm [B, T, width]
    logits: Tensor  # [B, T, 256]


class SmallLM(nn.Module):
    """A Llama-like decoder: RMSNorm, rotary positions, causal attention, SwiGLU. tokens [B, T] are int64 below 256."""

    def __init__(self, width: int = 128, layers: int = 4, heads: int = 4, hidden: int = 384):
        super().__init__()
        self.embed = nn.Embedding(BYTES, width)
        self.layers = nn.ModuleList(_Block(width, heads, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, BYTES, bias=False)
        angles = torch.outer(torch.arange(CONTEXT), 1e4 ** (-torch.arange(0, width // heads, 2) / (width // heads)))
        self.register_buffer("rotation", torch.stack([angles.cos(), angles.sin()]))  # [2, T, head / 2]

    def forward(self, tokens: Tensor) -> Output:
        x, rotation = self.embed(tokens), self.rotation[:, : tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, rotation)
        x = self.norm(x)
        return Output(x, self.lm_head(x))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        y = self.attention_norm(x)
        q, k, v = (
            p(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = scaled_dot_product_attention(_rotate(q, rotation), _rotate(k, rotation), v, is_causal=True)
        x = x + self.o_proj(y.transpose(1, 2).flatten(2))
        y = self.mlp_norm(x)
        return x + self.down_proj(silu(self.gate_proj(y)) * self.up_proj(y))


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary positions: the pair (x[i], x[i + half]) turned by the position's angle."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = rotation
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def english() -> tuple[Tensor, Tensor]:
    """Bytes to train on and held-out ones: the language reference as `pydoc` carries it, about 0.45 MB."""
    from pydoc_data.topics import topics

    return _split("\n\n".join(topics[key] for key in sorted(topics)).encode())


def code() -> tuple[Tensor, Tensor]:
    """The same for the standard library's sources: another text, with much that English lacks."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return _split(b"\n".join(file.read_bytes() for file in files)[:_CODE_BYTES])


def _split(text: bytes) -> tuple[Tensor, Tensor]:
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    held_out = int(_HELD_OUT * len(tokens))
    return tokens[:-held_out], tokens[-held_out:]


def windows(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Tokens [count, CONTEXT] int64 from random places of a text."""
    starts = torch.randint(len(text) - CONTEXT, (count, 1), generator=generator)
    return text[starts + torch.arange(CONTEXT)].long()


def next_byte_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of each byte but the first given those before it; of a model of transformers, too."""
    logits = model(tokens).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, held_out: Tensor) -> float:
    """exp(loss) over windows spread evenly over held-out text; the same ones for every model."""
    starts = torch.linspace(0, len(held_out) - CONTEXT, _WINDOWS).long().unsqueeze(1)
    tokens = held_out[starts + torch.arange(CONTEXT)].long()
    return math.exp(sum(next_byte_loss(model, part).item() for part in tokens.chunk(4)) / 4)


def train(
    model: nn.Module, text: Tensor, *, steps: int, lr: float, batch: int, seed: int, warmup: int = 20
) -> Iterator[tuple[int, float]]:
    """AdamW with a cosine schedule on what requires gradients; yields (steps done, loss) after each step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(steps, warmup))
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        loss = next_byte_loss(model, windows(text, batch, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        yield step, loss.item()


def _cosine(steps: int, warmup: int) -> Callable[[int], float]:
    return lambda step: min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def pretrained(steps: int, seed: int, progress: Callable[[int], None] | None = None, **sizes: int) -> SmallLM:
    """A model trained from scratch on `english`; ``progress`` is called with the number of each step."""
    torch.manual_seed(seed)
    model = SmallLM(**sizes)
    for step, _ in train(model, english()[0], steps=steps, lr=3e-3, batch=16, seed=seed):
        if progress is not None:
            progress(step)
    return model.eval()


def save_pretrained(model: SmallLM, folder: str | Path) -> None:
    """Write a model as a folder of transformers: a LlamaForCausalLM of the same logits, and a tokenizer of bytes."""
    llama = _as_llama(model)
    llama.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


# Of the tensors of a block, here and in transformers' Llama.
_NAMES = [
    *((f"{name}_proj.weight", f"self_attn.{name}_proj.weight") for name in "qkvo"),
    *((f"{name}_proj.weight", f"mlp.{name}_proj.weight") for name in ("gate", "up", "down")),
    ("attention_norm.weight", "input_layernorm.weight"),
    ("mlp_norm.weight", "post_attention_layernorm.weight"),
]


def _as_llama(model: SmallLM) -> Any:
    import transformers

    block = model.layers[0]
    config = transformers.LlamaConfig(
        vocab_size=BYTES,
        hidden_size=model.embed.embedding_dim,
        intermediate_size=block.up_proj.out_features,
        num_hidden_layers=len(model.layers),
        num_attention_heads=block.heads,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=torch.finfo(torch.float32).eps,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    llama = transformers.LlamaForCausalLM(config).eval()
    names = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    for i in range(len(model.layers)):
        names |= {f"layers.{i}.{ours}": f"model.layers.{i}.{theirs}" for ours, theirs in _NAMES}
    state = {names.get(ours, ours): tensor for ours, tensor in model.state_dict().items() if ours != "rotation"}
    llama.load_state_dict(state)
    return llama


def _tokenizer() -> Any:
    """A byte is a token, its own number; a chat is the contents of its messages, one after the other."""
    import tokenizers
    import transformers

    # The characters that byte-level tokenizers write bytes as: printable ones as they are, the rest from 256 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(BYTES) if byte not in printable]
    alphabet = {chr(byte if byte in printable else 256 + others.index(byte)): byte for byte in range(BYTES)}
    bytewise = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=alphabet, merges=[]))
    bytewise.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bytewise, model_max_length=CONTEXT)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loftq_kernels.recipes.small_lm", description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write the model")
    parser.add_argument("--steps", type=int, default=600, help="of training (default 600)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if args.folder.is_file() or (args.folder.is_dir() and any(args.folder.iterdir())):
        parser.error(f"{args.folder} exists: choose another folder")
    try:
        import transformers  # noqa: F401
    except ImportError:
        parser.error("it needs transformers: pip install 'loftq_kernels[hf]'")
    args.folder.mkdir(parents=True, exist_ok=True)
    with progress_bar(total=args.steps, desc="train", unit="step", show=True) as bar:
        model = pretrained(args.steps, args.seed, progress=lambda step: bar.update())
    save_pretrained(model, args.folder)
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.folder}: {weights} weights, perplexity {perplexity(model, english()[1]):.3f} of held-out text")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
