"""transformers' `generate` on quantized models: every cache and way to search gives the tokens of the dense twin."""

from __future__ import annotations

import copy
import functools

import hf_models
import pytest
import torch
from hf_models import TOKENS, dense_twin
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

PROMPT = TOKENS[:1]
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": hf_models.PAD}


@functools.cache
def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """The quantized model and its dense twin. Tests share them."""
    model = hf_models.quantized(name)[0]
    return model, dense_twin(model)


def generate(model: nn.Module, name: str = "llama", **options) -> Tensor:
    torch.manual_seed(0)
    given = hf_models.inputs(name, labels=False)
    given.setdefault("attention_mask", torch.ones_like(given["input_ids"])) if "input_ids" in given else None
    return model.generate(**{**given, **GREEDY, **options})


def alone(**options) -> dict:
    """Options for the first prompt alone: what guesses tokens ahead takes one at a time."""
    return {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT), **options}


@pytest.mark.parametrize("name", [name for name in hf_models.NAMES if hf_models.ARCHITECTURES[name].generates])
def test_architectures(name):
    model, twin = pair(name)
    greedy = generate(model, name)
    assert torch.equal(greedy, generate(twin, name)) and greedy.shape[1] >= 8
    if model._is_stateful:  # no state of theirs can be reordered, as beams need
        return
    assert torch.equal(generate(model, name, num_beams=3), generate(twin, name, num_beams=3))


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.3},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "do_sample": True},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        alone(prompt_lookup_num_tokens=3),
    ],
    ids=str,
)
def test_ways_to_search(options):
    model, twin = pair("llama")
    tokens = generate(model, **options)
    assert torch.equal(tokens, generate(twin, **options))
    if options.keys().isdisjoint(("num_beams", "do_sample", "repetition_penalty")):
        assert torch.equal(tokens, generate(model)[: len(tokens)]), "a cache or a guess changes no token"


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "t5", "whisper"])
def test_static_cache_of_other_architectures(name):
    model, _ = pair(name)
    assert torch.equal(generate(model, name, cache_implementation="static"), generate(model, name))


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_quantized_cache(backend):
    """Keys and values of 4 bits; that what is read differs a little is the cache's own doing."""
    pytest.importorskip("optimum.quanto" if backend == "quanto" else "hqq")
    model, twin = pair("llama")
    axis = {"axis_key": 0, "axis_value": 0} if backend == "quanto" else {"axis_key": 1, "axis_value": 1}
    cache = {"backend": backend, "nbits": 4, "q_group_size": 32, "residual_length": 4, **axis}
    options = {"cache_implementation": "quantized", "cache_config": cache}
    assert torch.equal(generate(model, **options), generate(twin, **options))


@pytest.mark.parametrize("assistant", ["itself", "another", "dense"])
def test_assisted_decoding(assistant):
    model, twin = pair("llama")
    helper = {"itself": model, "another": pair("llama tied")[0], "dense": twin}[assistant]
    assert torch.equal(generate(model, **alone(assistant_model=helper)), generate(model)[:1])


def test_padded_prompts():
    """A prompt that is padded on the left goes on as it does alone."""
    model, _ = pair("llama")
    short = TOKENS[1:, :5]
    batch = torch.cat([TOKENS[:1], nn.functional.pad(short, (4, 0), value=hf_models.PAD)])
    mask = (batch != hf_models.PAD).long()
    both = generate(model, input_ids=batch, attention_mask=mask)
    one = generate(model, input_ids=short, attention_mask=torch.ones_like(short))
    assert torch.equal(both[:1], generate(model)[:1]) and torch.equal(both[1, 9:], one[0, 5:])


def test_continues_from_a_cache():
    model, _ = pair("llama")
    cache = transformers.DynamicCache(config=model.config)
    first = generate(model, max_new_tokens=4, min_new_tokens=4, past_key_values=cache)
    mask = torch.ones_like(first)
    more = generate(
        model, input_ids=first, attention_mask=mask, past_key_values=cache, max_new_tokens=4, min_new_tokens=4
    )
    assert torch.equal(more, generate(model))


@pytest.mark.parametrize("by", ["forward", "compile_config"])
def test_compiled_decode_step(by):
    """One graph without a break for the prompt, one for every token after it."""
    plain = hf_models.quantized("llama", num_hidden_layers=1)[0]  # a compiler takes seconds for each layer
    model = copy.copy(plain)
    options = {"cache_implementation": "static"}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if by == "forward":
        model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    else:
        config = transformers.CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
        config._compile_all_devices = True  # by itself generate compiles for accelerators alone
        options["compile_config"] = config
    assert torch.equal(generate(model, **options), generate(plain))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch.equal(generate(model, **options), generate(plain))
    assert 0 < graphs <= 2 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_training_mode_and_disabled_adapter():
    """`generate` in the middle of training changes nothing; without the adapter it is another model."""
    model = copy.deepcopy(pair("llama")[0])
    expected = generate(model)
    model.train()
    assert torch.equal(generate(model), expected) and model.training
    for layer in hf_models.quantized_layers(model).values():
        layer.disable_adapter()
    assert torch.equal(generate(model), generate(dense_twin(model))) and not torch.equal(generate(model), expected)
