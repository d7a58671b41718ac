"""Tiny random models of transformers' architectures, with inputs and labels: the table that tests iterate over."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import gaussian
from torch import Tensor, nn

import loftq_kernels as lk
from loftq_kernels.nn.adapters import adapter_parameters, quantized_layers

VOCABULARY = 96
IMAGE_TOKEN = 95
PAD = 0
TOKENS = torch.randint(3, IMAGE_TOKEN, (2, 9), generator=torch.Generator().manual_seed(0))
PIXELS = gaussian(2, 3, 16, 16)

_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT = {**_SIZES, "intermediate_size": 96, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
_SPECIAL = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {**_TEXT, **_SPECIAL, "num_key_value_heads": 1, "tie_word_embeddings": False}
_HEADS = {**_DECODER, "head_dim": 32}
_TIED = {"tie_word_embeddings": True}
_GEMMA = {**_HEADS, **_TIED, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
_MOE = {**_HEADS, "num_experts_per_tok": 2}
_SEQ2SEQ = {**_SPECIAL, "vocab_size": VOCABULARY, "decoder_start_token_id": 1, "forced_eos_token_id": None}
_SIDES = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 2), ("ffn_dim", 96))}
_SIDES |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 64}
_T5 = {**_SEQ2SEQ, "d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
_DISENTANGLED = {
    "relative_attention": True,
    "position_buckets": 16,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
}
_DISENTANGLED |= {"max_relative_positions": -1, "pos_att_type": ["p2c", "c2p"]}
_MAMBA = {"hidden_size": 64, "state_size": 8, "num_hidden_layers": 2, "vocab_size": VOCABULARY, **_SPECIAL}
_VISION = {**_SIZES, "intermediate_size": 96, "image_size": 16, "patch_size": 8}
_SPEECH = {**_SIZES, "intermediate_size": 96, "vocab_size": 32, "conv_dim": [32, 32], "conv_stride": [5, 2]}
_SPEECH |= {"conv_kernel": [10, 3], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16}
_SPEECH |= {"num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0, "layerdrop": 0.0}
_CLIP = {"text_config": {**_TEXT, **_SPECIAL}, "vision_config": _VISION, "projection_dim": 48}

OPTIONS = {"rank": 4, "num_iter": 1, "group_size": 32}

Inputs = Callable[[], dict[str, Tensor]]


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": TOKENS}


def _language() -> dict[str, Tensor]:
    return {"input_ids": TOKENS, "labels": TOKENS}


def _classes() -> dict[str, Tensor]:
    return {"input_ids": TOKENS, "attention_mask": (torch.arange(9) < torch.tensor([[9], [6]])).long()} | _two_labels()


def _two_labels() -> dict[str, Tensor]:
    return {"labels": torch.tensor([0, 1])}


def _image_classes() -> dict[str, Tensor]:
    return {"pixel_values": PIXELS, **_two_labels()}


def _speech_to_text() -> dict[str, Tensor]:
    return {"input_features": gaussian(2, 16, 32), "labels": TOKENS}


def _waveform() -> dict[str, Tensor]:
    return {"input_values": gaussian(2, 400), "labels": TOKENS[:, :3] % 32}


def _image_and_tokens() -> dict[str, Tensor]:
    """Four patches of an image, then text."""
    tokens = torch.cat([torch.full((2, 4), IMAGE_TOKEN), TOKENS], 1)
    return {"input_ids": tokens, "pixel_values": PIXELS, "labels": tokens}


def _image_and_caption() -> dict[str, Tensor]:
    return {"input_ids": TOKENS, "pixel_values": PIXELS}


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        model: the class in transformers.
        options: of its config.
        inputs: what its forward takes, with labels where its forward takes them.
        dense: parts of names of parameters that must be reported as left dense.
        tied: whether the input embedding is also the output head, or shared otherwise.
        loss: options of the forward that make it return a loss, for models without labels.
        reads: how many weights of quantized layers the model's own code reads in a forward, which decodes them.
    """

    model: str
    options: dict[str, Any]
    inputs: Inputs = _language
    dense: tuple[str, ...] = ()
    tied: bool = False
    loss: dict[str, bool] = field(default_factory=dict)
    reads: int = 0

    @property
    def generates(self) -> bool:
        return self.model.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", _DECODER, dense=("lm_head.weight",)),
    "llama tied": Architecture("LlamaForCausalLM", {**_DECODER, **_TIED}, tied=True),
    "mistral": Architecture("MistralForCausalLM", {**_DECODER, "sliding_window": 4}),
    "qwen2": Architecture("Qwen2ForCausalLM", _DECODER),
    "qwen3": Architecture("Qwen3ForCausalLM", {**_HEADS, **_TIED}, tied=True),
    "gemma": Architecture("GemmaForCausalLM", {**_HEADS, **_TIED}, tied=True),
    "gemma2": Architecture("Gemma2ForCausalLM", _GEMMA, tied=True),
    "gemma3": Architecture("Gemma3ForCausalLM", _GEMMA, tied=True),
    "phi3": Architecture("Phi3ForCausalLM", _DECODER),
    "olmo2": Architecture("Olmo2ForCausalLM", _DECODER),
    "falcon": Architecture("FalconForCausalLM", {**_TEXT, **_SPECIAL, **_TIED, "alibi": False}, tied=True),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        {**_SPECIAL, "vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 2},
        tied=True,
    ),
    "gpt-neox": Architecture("GPTNeoXForCausalLM", {**_TEXT, **_SPECIAL}),
    "opt": Architecture("OPTForCausalLM", {**_TEXT, **_SPECIAL, "ffn_dim": 96, "word_embed_proj_dim": 32}, tied=True),
    "bloom": Architecture(
        "BloomForCausalLM",
        {**_SPECIAL, "vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 2},
        tied=True,
    ),
    "mamba": Architecture("MambaForCausalLM", {**_MAMBA, "time_step_rank": 64}, tied=True, reads=2),
    "mamba2": Architecture(
        "Mamba2ForCausalLM", {**_MAMBA, "num_heads": 4, "head_dim": 32, "n_groups": 1, "chunk_size": 4}
    ),
    "lfm2": Architecture(
        "Lfm2ForCausalLM",
        {**_DECODER, **_TIED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        dense=("conv.conv.weight",),
        tied=True,
    ),
    "mixtral": Architecture(
        "MixtralForCausalLM", {**_DECODER, "num_local_experts": 4}, dense=("experts", "gate.weight")
    ),
    "qwen3 moe": Architecture(
        "Qwen3MoeForCausalLM", {**_MOE, "num_experts": 4, "moe_intermediate_size": 64}, dense=("experts", "gate.weight")
    ),
    "gpt-oss": Architecture("GptOssForCausalLM", {**_MOE, "num_local_experts": 4}, dense=("experts", "router.weight")),
    "t5": Architecture("T5ForConditionalGeneration", _T5, tied=True),
    "t5 gated": Architecture(
        "T5ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu"}, dense=("shared.weight",), tied=True
    ),
    "bart": Architecture(
        "BartForConditionalGeneration", {**_SEQ2SEQ, **_SIDES, "max_position_embeddings": 64}, tied=True
    ),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        {**_SEQ2SEQ, **_SIDES, "num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 64},
        _speech_to_text,
        dense=("model.encoder.conv1.weight",),
        tied=True,
    ),
    "wav2vec2": Architecture("Wav2Vec2ForCTC", _SPEECH, _waveform, dense=("conv_layers.0.conv.weight",)),
    "bert": Architecture("BertForSequenceClassification", _TEXT, _classes),
    "roberta": Architecture("RobertaForSequenceClassification", {**_TEXT, **_SPECIAL}, _classes),
    "modernbert": Architecture(
        "ModernBertForMaskedLM", {**_TEXT, **_SPECIAL, "local_attention": 8, "global_attn_every_n_layers": 2}, tied=True
    ),
    "deberta": Architecture(
        "DebertaV2ForTokenClassification",
        {**_TEXT, **_DISENTANGLED, "num_labels": VOCABULARY},
        dense=("encoder.rel_embeddings.weight",),
    ),
    "vit": Architecture("ViTForImageClassification", _VISION, _image_classes),
    "dinov2": Architecture("Dinov2ForImageClassification", {**_VISION, "mlp_ratio": 2}, _image_classes),
    "clip": Architecture("CLIPModel", _CLIP, _image_and_caption, loss={"return_loss": True}),
    "siglip": Architecture("SiglipModel", _CLIP, _image_and_caption, loss={"return_loss": True}),
    "llava": Architecture(
        "LlavaForConditionalGeneration",
        {
            "text_config": {**_DECODER, "model_type": "llama"},
            "vision_config": {**_VISION, "model_type": "clip_vision_model", "projection_dim": 48},
            "image_token_index": IMAGE_TOKEN,
            "image_seq_length": 4,
        },
        _image_and_tokens,
    ),
}
NAMES = [*ARCHITECTURES]


def model_class(name: str) -> type[nn.Module]:
    return getattr(pytest.importorskip("transformers"), ARCHITECTURES[name].model)


def dense_model(name: str, **changes) -> nn.Module:
    """A new model of random weights; biases, norms and the like are none of the zeros and ones that hide mistakes.

    ``changes`` are options of its config.
    """
    torch.manual_seed(0)
    cls = model_class(name)
    model = cls(cls.config_class(**{**ARCHITECTURES[name].options, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(gaussian(*parameter.shape, seed=parameter.numel()), alpha=0.02)
    return model


def adapter_config(**options) -> lk.QuantConfig:
    """What tests over architectures quantize with: small, and quick to initialize."""
    return lk.QuantConfig(**{**OPTIONS, **options})


def fill_adapters(model: nn.Module) -> nn.Module:
    """Numbers in every adapter that are large enough to change what the model computes."""
    for number, parameter in enumerate(adapter_parameters(model).values()):
        parameter.data.copy_(gaussian(*parameter.shape, seed=number)).mul_(0.1)
    return model


@functools.cache
def quantized(name: str, **changes) -> tuple[nn.Module, lk.QuantizationReport]:
    """The quantized model, its adapters filled, and the report. Tests share it: none may change it."""
    model = dense_model(name, **changes)
    report = lk.quantize_model(model, adapter_config(), progress=False)
    return fill_adapters(model), report


def dense_twin(model: nn.Module) -> nn.Module:
    """A copy of dense layers that hold the same weights, adapters merged in float32."""
    twin = copy.deepcopy(model)
    for name, layer in quantized_layers(model).items():
        twin.set_submodule(name, getattr(layer, layer.dense_copy)())
    return twin


def inputs(name: str, *, labels: bool = True) -> dict[str, Tensor]:
    """What the model's forward takes; with labels, its output has a loss."""
    one = ARCHITECTURES[name]
    given = one.inputs()
    return {**given, **one.loss} if labels else {key: value for key, value in given.items() if key != "labels"}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' messages and bars, and without collecting objects that are there already over and over.

    Trainer frees memory by a full collection, which takes longer than these models train.
    """
    logging = pytest.importorskip("transformers").logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        logging.enable_progress_bar()
        logging.set_verbosity(level)


def logits(output: Any) -> Tensor:
    """The values that a user reads: logits, or the scores of image and text."""
    return next(output[key] for key in ("logits", "logits_per_image") if key in output)
