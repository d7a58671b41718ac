"""llama.cpp's model of ``bench generate``: the same weights in a GGUF file, quantized to Q4_0 by llama.cpp itself.

It runs by an interpreter that has llama-cpp-python and gguf, and need not have torch:
``python -m bench.llama_cpp_model prepare FOLDER DENSE`` and ``python -m bench.llama_cpp_model serve FOLDER THREADS``.
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as lib
import numpy as np

from bench import worker

FILE = "Q4_0.gguf"
MOST_TOKENS = 512  # of a sequence
_OUTSIDE = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_IN_BLOCKS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def prepare(own: Path, dense: Path) -> None:
    """Write the bfloat16 weights to a GGUF file, and quantize that as llama-quantize does.

    Rows of q and k are not reordered for llama.cpp's rotary embedding: the weights are random.
    """
    config = json.loads((dense / "config.json").read_text(encoding="utf-8"))
    wide = own / "bf16.gguf"
    writer = gguf.GGUFWriter(wide, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, values in _tensors(dense):
        if values.ndim == 1:  # llama.cpp keeps vectors in float32.
            writer.add_tensor(name, (values.astype(np.uint32) << 16).view(np.float32))
        else:
            writer.add_tensor(name, values.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    options = lib.llama_model_quantize_default_params()
    options.ftype = lib.LLAMA_FTYPE_MOSTLY_Q4_0
    if failed := lib.llama_model_quantize(bytes(wide), bytes(own / FILE), ctypes.byref(options)):
        raise RuntimeError(f"llama_model_quantize returned {failed}")
    wide.unlink()


def _tensors(dense: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names in GGUF files, and bfloat16 values as uint16."""
    for path in sorted(dense.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        stored = np.memmap(path, np.uint8, "r", offset=8 + length)
        for name, about in header.items():
            if name != "__metadata__":
                first, last = about["data_offsets"]
                yield _name(name), np.asarray(stored[first:last]).view(np.uint16).reshape(about["shape"])


def _name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    parts = name.removeprefix("model.").removesuffix(".weight").split(".", 2)
    inside = f"blk.{parts[1]}.{_IN_BLOCKS[parts[2]]}" if parts[0] == "layers" else _OUTSIDE[parts[0]]
    return f"{inside}.weight"


class Runner:
    """A `worker.Model`: greedy decoding by `llama_decode`."""

    def __init__(self, path: Path, threads: int):
        self._quiet = lib.llama_log_callback(lambda *_: None)  # Kept, as llama.cpp calls it later.
        lib.llama_log_set(self._quiet, ctypes.c_void_p(0))
        lib.llama_backend_init()
        options = lib.llama_model_default_params()
        options.use_mmap = False
        self._model = lib.llama_model_load_from_file(bytes(path), options)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path.name}")
        self._threads = threads
        self._contexts: dict[tuple[int, int], Any] = {}
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._batch = lib.llama_batch_init(MOST_TOKENS, 0, 1)

    def leave_files(self) -> None:
        """Nothing is mapped: the file was read."""

    def prompt(self, tokens: int) -> float:
        context = self._context(1, 0)
        lib.llama_memory_clear(lib.llama_get_memory(context), False)
        started = time.perf_counter()
        self._process(context, self._random(tokens))
        self._likeliest(context, tokens - 1)
        return time.perf_counter() - started

    def decode(self, batch: int, context: int, steps: int) -> float:
        """The first step is not counted: what it allocates stays."""
        made = self._context(batch, context)
        tokens = [0] * batch
        for step in range(steps + 1):
            if step == 1:
                started = time.perf_counter()
            self._process(made, [(token, context + step, i, True) for i, token in enumerate(tokens)])
            tokens = [self._likeliest(made, i) for i in range(batch)]
        seconds = (time.perf_counter() - started) / steps
        lib.llama_memory_seq_rm(lib.llama_get_memory(made), -1, context, -1)
        return seconds

    def _context(self, batch: int, tokens: int) -> Any:
        """One of ``batch`` sequences, each with the same random tokens."""
        if (batch, tokens) not in self._contexts:
            options = lib.llama_context_default_params()
            options.n_ctx, options.n_seq_max = batch * MOST_TOKENS, batch
            options.n_batch = options.n_ubatch = MOST_TOKENS
            options.n_threads = options.n_threads_batch = self._threads
            made = self._contexts[batch, tokens] = lib.llama_init_from_model(self._model, options)
            if tokens:
                self._process(made, self._random(tokens))
            for i in range(1, batch):
                lib.llama_memory_seq_cp(lib.llama_get_memory(made), 0, i, -1, -1)
        return self._contexts[batch, tokens]

    def _random(self, count: int) -> list[tuple[int, int, int, bool]]:
        return [(random.randrange(self._vocabulary), i, 0, i == count - 1) for i in range(count)]

    def _process(self, context: Any, tokens: Sequence[tuple[int, int, int, bool]]) -> None:
        """Tokens as (id, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        if failed := lib.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {failed}")

    def _likeliest(self, context: Any, i: int) -> int:
        """The next token by the logits of a batch's token i."""
        logits = lib.llama_get_logits_ith(context, i)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())


def main(what: str, folder: str, argument: str) -> None:
    if what == "prepare":
        prepare(Path(folder), Path(argument))
    else:
        worker.serve(lambda: Runner(Path(folder) / FILE, int(argument)))


if __name__ == "__main__":
    main(*sys.argv[1:])
