"""The contenders of ``bench generate``: how each makes its folder of the dense model, and how it loads and runs it.

``python -m bench.models NAME FOLDER THREADS`` is the process of one of them; llama.cpp's is `bench.llama_cpp_model`.
"""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import loftq_kernels as lk
from bench import worker
from bench.peers import GROUP, package
from loftq_kernels.ops.constant import Constant, plain

FORMATS, RANK = ("nf4", "nf2"), 16
DENSE = "bf16 transformers"
PEERS_PYTHON = "LLAMA_CPP_PYTHON"  # The variable with the interpreter of llama.cpp's process.
SIZES = {  # Llama-3.2-1B's; a small one, to try the benchmark out.
    False: {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256},
    True: {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": 4096},
}
HEAD_DIM, QUERIES_PER_KEY = 64, 4
_TENSORS = "int4.pt"

Prepare = Callable[[Path, Path], None]  # (folder of the dense model, its own folder, which it makes)


@dataclass(frozen=True)
class Contender:
    """`prepare` makes the folder that `load` reads; `missing` says why it is not here, with the remedy."""

    name: str
    prepare: Prepare
    load: Callable[[Path], nn.Module] | None  # None: its process is not ours.
    missing: Callable[[], str | None] = lambda: None
    quantized_head: bool = False

    def start(self, folder: Path, threads: int, log: Path) -> worker.Process:
        """The process that holds its model."""
        if self.load is None:
            return _llama_cpp("serve", folder, threads, log)
        environment = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return worker.Process(sys.executable, "bench.models", [self.name, str(folder), str(threads)], environment, log)


def dense_model(sizes: dict[str, int]) -> nn.Module:
    """A Llama with random weights in bfloat16, its head tied to its embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = sizes["hidden_size"] // HEAD_DIM
    config = LlamaConfig(
        **sizes,
        num_attention_heads=heads,
        num_key_value_heads=heads // QUERIES_PER_KEY,
        head_dim=HEAD_DIM,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=None,
        eos_token_id=None,  # So that no sequence ends by itself.
    )
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


class Runner:
    """A `worker.Model`: `generate` of transformers, as a user calls it."""

    def __init__(self, model: nn.Module):
        self._model = model.eval()
        self._vocabulary = model.config.vocab_size
        self._caches: dict[tuple[int, int], Any] = {}

    def leave_files(self) -> None:
        for module in self._model.modules():
            for name, parameter in module._parameters.items():
                if isinstance(parameter, Constant):
                    module._parameters[name] = Constant(plain(parameter).clone())
                elif parameter is not None:
                    parameter.data = parameter.data.clone()
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.clone()

    def _tokens(self, *shape: int) -> Tensor:
        return torch.randint(self._vocabulary, shape)

    @torch.no_grad()
    def prompt(self, tokens: int) -> float:
        ids = self._tokens(1, tokens)
        started = time.perf_counter()
        self._model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - started

    @torch.no_grad()
    def decode(self, batch: int, context: int, steps: int) -> float:
        """By the times between the first token, which is chosen before the clock starts, and the last."""
        cache, stamps = self._cache(batch, context), Stamps()
        self._model.generate(
            self._tokens(batch, context + 1),
            past_key_values=cache,
            max_new_tokens=steps + 1,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[stamps],
        )
        cache.crop(context - cache.get_seq_length())
        return (stamps.times[-1] - stamps.times[0]) / steps

    def _cache(self, batch: int, context: int) -> Any:
        """Keys and values of a context, the same for each sequence of the batch."""
        from transformers import DynamicCache

        if (batch, context) not in self._caches:
            cache = DynamicCache(config=self._model.config)
            self._model(input_ids=self._tokens(1, context), past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(batch)
            self._caches[batch, context] = cache
        return self._caches[batch, context]


class Stamps:
    """A stopping criterion that stops nothing: `generate` calls it after each token, and it notes the time."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


# ---- contenders


def _link(dense: Path, own: Path) -> None:
    own.symlink_to(dense, target_is_directory=True)


def _from_pretrained(folder: Path, **options: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)


def _bitsandbytes(dense: Path, own: Path) -> None:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    _from_pretrained(dense, quantization_config=config, device_map="cpu").save_pretrained(own)


class Int4Linear(nn.Module):
    """An `nn.Linear` without bias on ATen's int4 product, as torchao's weight-only int4 computes it on a CPU."""

    def __init__(self, codes: Tensor, scale_and_zero: Tensor):
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale_and_zero", scale_and_zero)

    @classmethod
    def of(cls, weight: Tensor) -> Int4Linear:
        """weight [N, K] ~ (codes - 8) * scale + zero, groups of `GROUP` columns between their least and their most."""
        groups = weight.float().unflatten(1, (-1, GROUP))
        least, most = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        scale = ((most - least) / 15).clamp_min(1e-8)
        codes = ((groups - least) / scale).round().clamp(0, 15).int().flatten(1)
        pairs = torch.cat([scale, least + 8 * scale], 2).transpose(0, 1).contiguous().to(torch.bfloat16)
        return cls(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), pairs)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.flatten(0, -2), self.codes, GROUP, self.scale_and_zero)
        return y.view(*x.shape[:-1], y.shape[-1])


def _blocks_linear(model: nn.Module) -> list[str]:
    return [name for name, module in model.model.named_modules(prefix="model") if isinstance(module, nn.Linear)]


def _int4(dense: Path, own: Path) -> None:
    model = _from_pretrained(dense)
    for name in _blocks_linear(model):
        model.set_submodule(name, Int4Linear.of(model.get_submodule(name).weight.detach()))
    own.mkdir()
    model.config.save_pretrained(own)
    torch.save(model.state_dict(), own / _TENSORS)


def _load_int4(folder: Path) -> nn.Module:
    """The model without its dense layers, then the tensors of the file in their places."""
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(folder)
    tensors = torch.load(folder / _TENSORS, weights_only=True, mmap=True)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for name in _blocks_linear(model):
        model.set_submodule(name, Int4Linear(*(tensors[f"{name}.{part}"] for part in ("codes", "scale_and_zero"))))
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # Its frequencies are in no file.
    return model


def _llama_cpp_missing() -> str | None:
    remedy = f"pip install llama-cpp-python gguf, and set {PEERS_PYTHON} to the interpreter that has them"
    if PEERS_PYTHON not in os.environ:
        return f"{PEERS_PYTHON} is not set ({remedy})"
    command = [os.environ[PEERS_PYTHON], "-c", "import gguf, llama_cpp"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{PEERS_PYTHON}={command[0]} does not start: {error.strerror} ({remedy})"
    said = done.stderr.strip().splitlines()
    return f"{PEERS_PYTHON}={command[0]}: {said[-1]} ({remedy})" if done.returncode else None


def _llama_cpp(what: str, folder: Path, threads: int, log: Path) -> worker.Process:
    return worker.Process(os.environ[PEERS_PYTHON], "bench.llama_cpp_model", [what, str(folder), str(threads)], {}, log)


def _gguf(dense: Path, own: Path) -> None:
    own.mkdir()
    command = [os.environ[PEERS_PYTHON], "-m", "bench.llama_cpp_model", "prepare", str(own), str(dense)]
    done = subprocess.run(command, cwd=worker.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"no GGUF file was written: {' / '.join(done.stderr.strip().splitlines()[-3:])}")


def ours(format: str, rank: int | None, head: bool, attention: bool = False) -> Contender:
    """Our model of a format, with or without adapters, a quantized head and our attention of decode steps."""
    parts = [format, f" r={rank}" * (rank is not None), " + head" * head, " + attention" * attention]
    load = _with_our_attention if attention else lk.load_quantized
    return Contender("".join(parts), functools.partial(_quantize, format, rank, head), load, quantized_head=head)


def _with_our_attention(folder: Path) -> nn.Module:
    model = lk.load_quantized(folder)
    model.set_attn_implementation("loftq_sdpa")
    return model


def _quantize(format: str, rank: int | None, head: bool, dense: Path, own: Path) -> None:
    model = _from_pretrained(dense)
    # "qlora" rounds once; how fast the products are does not depend on what the codes are.
    # Adapters are in bfloat16, as the model is where it serves; training has them in float32.
    cfg = lk.QuantConfig(
        format, rank=rank, init="qlora", group_size=GROUP, quantize_head=head, adapter_dtype=torch.bfloat16
    )
    lk.quantize_model(model, cfg, progress=False)
    lk.save_quantized(model, own)


PEERS = (
    Contender(DENSE, _link, _from_pretrained),
    Contender(
        "bitsandbytes nf4",
        _bitsandbytes,
        functools.partial(_from_pretrained, device_map="cpu"),
        missing=lambda: package("bitsandbytes")() or package("accelerate")(),
    ),
    Contender("aten int4pack", _int4, _load_int4),
    Contender("llama.cpp Q4_0", _gguf, None, _llama_cpp_missing, quantized_head=True),
)


def contenders(formats: Sequence[str] | None, peers: Sequence[str] | None) -> list[Contender]:
    """Those named, or all."""
    known = {peer.name: peer for peer in PEERS}
    if unknown := sorted(set(peers or ()) - set(known)):
        raise ValueError(f"--peer {unknown[0]!r} is not known; known: {', '.join(known)}")
    if unknown := sorted(set(formats or ()) - set(lk.format_names())):
        raise ValueError(f"--format {unknown[0]!r} is not known; known: {', '.join(lk.format_names())}")
    own = [ours(*parts) for parts in itertools.product(formats or FORMATS, (None, RANK), (False, True))]
    own += [ours(name, None, True, attention=True) for name in formats or FORMATS[:1]]
    return [*(peer for peer in PEERS if peers is None or peer.name in peers), *own]


def named(name: str) -> Contender:
    """The contender of that name, in its process."""
    every = contenders(lk.format_names(), None)
    return next(one for one in every if one.name == name)


def main(name: str, folder: str, threads: str) -> None:
    from transformers import LlamaForCausalLM  # noqa: F401  Before the clock starts.

    torch.set_num_threads(int(threads))
    worker.serve(lambda: Runner(named(name).load(Path(folder))))


if __name__ == "__main__":
    main(*sys.argv[1:])
