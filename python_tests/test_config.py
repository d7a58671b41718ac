"""`QuantConfig`: defaults, patterns, overrides, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

import loftq_kernels as lk
from loftq_kernels.initializers.config import adapter_scaling
from loftq_kernels.models.config import matches


def test_defaults():
    cfg = lk.QuantConfig()
    assert (cfg.format, cfg.group_size, cfg.rank, cfg.init, cfg.num_iter, cfg.scaling) == ("nf4", 64, 16, "loftq", 5, 1)
    assert cfg.scale_dtype == torch.float16
    assert cfg.selects("encoder.layer.0.dense") and not cfg.quantize_head and cfg.exclude == ()


@pytest.mark.parametrize(
    ("rank", "alpha", "rslora", "scaling"),
    [(16, None, False, 1), (16, None, True, 1), (64, 16, False, 0.25), (16, 32, True, 8), (None, 16, False, 1)],
)
def test_scaling(rank, alpha, rslora, scaling):
    assert adapter_scaling(rank, alpha, rslora) == scaling
    assert lk.QuantConfig(rank=rank, lora_alpha=alpha, use_rslora=rslora).scaling == scaling


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("a.b.c", "*", True),
        ("a.b.c", "a.*", True),
        ("a.b.c", "*.c", True),
        ("a.b.c", "b", False),
        ("a.0.c", "a.[01].c", True),
        ("a.2.c", "a.[01].c", False),
        ("a.b.c", "A.*", False),
        ("a.12.c", r"re:a\.\d+\.c", True),
        ("a.12.cd", r"re:a\.\d+\.c", False),
        ("a.b.c", r"re:b", False),
    ],
)
def test_patterns(name, pattern, expected):
    assert matches(name, pattern) is expected


def test_selection():
    cfg = lk.QuantConfig(include=("encoder.*", "re:head[0-9]"), exclude=("*.norm",))
    assert cfg.selects("encoder.a") and cfg.selects("head3")
    assert not cfg.selects("encoder.norm") and not cfg.selects("decoder.a") and not cfg.selects("head")
    assert lk.QuantConfig(include="encoder.*").include == ("encoder.*",), "a lone pattern is not taken apart"


def test_overrides():
    cfg = lk.QuantConfig(
        rank=8, overrides={"*.0.*": {"format": "nf2", "rank": 4}, "*.up": None, "re:.*": {"group_size": 32}}
    )
    first = cfg.for_layer("layers.0.up")
    assert (first.format, first.rank, first.group_size, first.num_iter) == ("nf2", 4, 64, 5), "the first match wins"
    assert cfg.for_layer("layers.1.up") is None
    assert cfg.for_layer("layers.1.down").group_size == 32
    assert lk.QuantConfig().for_layer("x") == lk.LayerConfig() == lk.QuantConfig().layer


def test_overrides_of_the_initializer():
    """Fields that the base has for its own initializer do not stand in the way of another one."""
    cfg = lk.QuantConfig(init="aser", rank_energy=0.5, overrides={"a": {"init": "qlora"}, "b": {"rank": 3}})
    assert cfg.for_layer("a").rank_energy is None and cfg.for_layer("b").rank_energy == 0.5
    overrides = {"a": {"init": "eora"}, "b": {"adapter": "qalora"}, "c": {"num_iter": 1}}
    cfg = lk.QuantConfig(order="svd_first", overrides=overrides)
    assert [cfg.for_layer(name).order for name in "abcd"] == ["quantize_first"] * 2 + ["svd_first"] * 2
    cfg = lk.QuantConfig(overrides={"a": {"init": "aser", "rank_energy": 0.5}})
    assert cfg.for_layer("a").rank_energy == 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "nf5"}, "unknown format 'nf5'"),
        ({"group_size": 48}, "group_size=48"),
        ({"rank": 0}, "rank=0"),
        ({"rank": -4}, "rank=-4"),
        ({"rank": 2.0}, r"rank=2\.0"),
        ({"rank": True}, "rank=True"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
        ({"lora_alpha": -1.0}, r"lora_alpha=-1\.0"),
        ({"lora_alpha": math.inf}, "lora_alpha=inf"),
        ({"scale_dtype": torch.float64}, "scale_dtype=torch.float64"),
        ({"init": "pissa"}, "unknown init 'pissa'.*loftq"),
        ({"num_iter": 0}, "num_iter=0"),
        ({"svd": "full"}, "svd='full'"),
        ({"order": "any"}, "order='any'"),
        ({"order": "svd_first", "init": "eora"}, "order='svd_first'.*init='eora'"),
        ({"order": "svd_first", "init": "aser"}, "order='svd_first'.*init='aser'"),
        ({"order": "svd_first", "init": "qlora"}, "order='svd_first'.*init='qlora'"),
        ({"order": "svd_first", "adapter": "qalora"}, "order='svd_first'.*adapter='qalora'"),
        ({"rank_energy": 0.5}, r"rank_energy=0\.5.*init='loftq'"),
        ({"rank_energy": 0.5, "init": "eora"}, r"rank_energy=0\.5.*init='eora'"),
        ({"overrides": {"*": {"rank_energy": 0.5}}}, r"rank_energy=0\.5"),
        ({"overrides": {"*": {"init": "qlora", "order": "svd_first"}}}, "order='svd_first'"),
        ({"include": "re:("}, r"re:\("),
        ({"overrides": {"*": {"format": "nf5"}}}, "unknown format 'nf5'"),
        ({"overrides": {"*": {"rank": 0}}}, "rank=0"),
        ({"overrides": {"a*": {"colour": 1}}}, r"override 'a\*' sets colour"),
        ({"overrides": {"*": {"overrides": {}}}}, "overrides"),
    ],
    ids=str,
)
def test_refused(fields, message):
    """At the latest when a model is to be quantized, and before any work is done."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    with pytest.raises((ValueError, TypeError), match=message):
        lk.quantize_model(model, lk.QuantConfig(**fields), progress=False)
    assert type(model[0]) is torch.nn.Linear
