"""Attention of decode steps, against transformers' own "sdpa" and float64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import loftq_kernels as lk  # noqa: F401  It makes the name known.

transformers = pytest.importorskip("transformers")

from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402

from loftq_kernels.integrations import attention  # noqa: E402

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}


def tiny(cls: str = "LlamaForCausalLM", **fields) -> nn.Module:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return getattr(transformers, cls)(getattr(transformers, cls).config_class(**SIZES | heads | fields)).eval()


class Layer(nn.Module):
    """What an attention function reads of the module that calls it."""

    is_causal = True

    def __init__(self, groups: int):
        super().__init__()
        self.num_key_value_groups = groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (6, 1), (3, 3)])
def test_one_query(heads, groups, dtype):
    """No further from float64 than "sdpa" is, and in its shape."""
    q, k, v = (torch.randn(3, n, t, 16).to(dtype) for n, t in ((heads, 1), (groups, 21), (groups, 21)))
    y, none = attention.attention(Layer(heads // groups), q, k, v, None, scaling=0.3)
    theirs, _ = sdpa_attention_forward(Layer(heads // groups), q, k, v, None, scaling=0.3)
    wide_k, wide_v = (t.double().repeat_interleave(heads // groups, 1) for t in (k, v))
    expected = (torch.softmax(0.3 * q.double() @ wide_k.mT, -1) @ wide_v).transpose(1, 2)
    assert none is None and y.shape == theirs.shape and y.dtype == dtype
    assert (y.double() - expected).norm() <= 1.2 * (theirs.double() - expected).norm() + 1e-6


@pytest.mark.parametrize("case", ["rows", "mask", "position_bias", "softcap"])
def test_the_rest_is_left_to_sdpa(case, monkeypatch):
    seen = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *args, **options: seen.append((args, options)))
    q, k = torch.randn(1, 4, 2 if case == "rows" else 1, 16), torch.randn(1, 2, 5, 16)
    mask = torch.ones(1, 1, 1, 5, dtype=torch.bool) if case == "mask" else None
    options = {case: 1.0} if case in ("position_bias", "softcap") else {}
    attention.attention(Layer(2), q, k, k, mask, scaling=0.3, **options)
    ((args, given),) = seen
    assert args[1] is q and args[4] is mask and given == {"dropout": 0.0, "scaling": 0.3, **options}


@pytest.mark.parametrize("cls", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM"])
@torch.no_grad()
def test_generate(cls):
    """Whole models, also with padding, write the tokens that they write with "sdpa"."""
    model = tiny(cls)
    ids = torch.randint(1, 96, (2, 7))
    for mask in (torch.ones_like(ids), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])):
        written = []
        for name in ("sdpa", attention.NAME):
            model.set_attn_implementation(name)
            given = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
            result = model.generate(ids, **given, output_logits=True, return_dict_in_generate=True)
            written.append((result.sequences, torch.stack(result.logits)))
        assert torch.equal(written[0][0], written[1][0])
        torch.testing.assert_close(written[0][1], written[1][1], rtol=1e-4, atol=1e-5)


def test_a_gradient_reaches_all():
    q, k, v = (torch.randn(2, n, t, 16, requires_grad=True) for n, t in ((4, 1), (2, 5), (2, 5)))
    ours = torch.autograd.grad(attention.attention(Layer(2), q, k, v, None)[0].square().sum(), (q, k, v))
    theirs = torch.autograd.grad(sdpa_attention_forward(Layer(2), q, k, v, None)[0].square().sum(), (q, k, v))
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["loftq_kernels, transformers", "transformers, loftq_kernels"])
def test_known_in_either_order(order):
    code = f"import {order}; from transformers import AutoModelForCausalLM, AttentionInterface as known; "
    code += "import transformers.modeling_utils; assert 'loftq_sdpa' in known()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
