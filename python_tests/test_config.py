"""`QuantConfig`: defaults, patterns, overrides, and what it refuses."""

from __future__ import annotations

import copy
import json
import math
import pickle

import numpy
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


def test_forms_of_overrides():
    """A format's name, changed fields, a whole `LayerConfig`, or None and "dense": as one form, also through JSON."""
    whole = lk.LayerConfig(format="int4", rank=3, adapter_dtype=torch.bfloat16)
    cfg = lk.QuantConfig(rank=8, overrides={"*.q": "nf2", "*.k": "dense", "*.v": whole, "*.o": None})
    assert cfg.overrides == {"*.q": {"format": "nf2"}, "*.k": None, "*.v": dict(vars(whole)), "*.o": None}
    assert cfg.for_layer("a.q") == lk.LayerConfig(format="nf2", rank=8) and cfg.for_layer("a.v") == whole
    assert cfg.for_layer("a.k") is None and cfg.for_layer("a.o") is None
    for values in (cfg.to_dict(), json.loads(json.dumps(cfg.to_dict()))):
        assert lk.QuantConfig.from_dict(values) == cfg
    assert lk.QuantConfig.from_dict({"rank": 8, "overrides": {"*.q": "nf2", "*.k": "dense"}}).overrides["*.k"] is None
    with pytest.raises(ValueError, match="unknown format 'nf9'; known: nf2"):
        lk.QuantConfig(overrides={"*": "nf9"})


@pytest.mark.parametrize("name", ["include", "exclude", "modules_to_save", "layer_types"])
def test_a_lone_string_is_one_of_them(name):
    value = "conv" if name == "layer_types" else "*.q"
    assert getattr(lk.QuantConfig(**{name: value}), name) == (value,)
    assert getattr(lk.QuantConfig.from_dict({name: value}), name) == (value,)


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


def wrong_kinds() -> list[tuple[dict, str]]:
    return [
        ({"exclude": None}, "exclude must be a pattern or a tuple of them, got None"),
        ({"modules_to_save": 3}, "modules_to_save must be a pattern"),
        ({"include": [3]}, "include must hold strings, got 3"),
        ({"overrides": None}, "overrides must map patterns"),
        ({"overrides": [("a", None)]}, "overrides must map patterns"),
        ({"overrides": {3: None}}, "overrides must hold strings, got 3"),
        ({"overrides": {"a": ["nf2"]}}, r"override 'a' must be a format, a dict of .* None or 'dense', got \['nf2'\]"),
        ({"overrides": {"a": lk.QuantConfig()}}, "override 'a' must be a format, a dict of changed fields, a LayerC"),
        ({"layer_types": None}, "layer_types=None must hold some of"),
        ({"quantize_head": 1}, "quantize_head must be True or False"),
        ({"adapter_dtype": "bfloat16"}, "adapter_dtype='bfloat16'"),
        ({"adapter_dtype": torch.int8}, "adapter_dtype=torch.int8"),
    ]


@pytest.mark.parametrize(("fields", "message"), wrong_kinds(), ids=str)
def test_wrong_kinds_are_refused_in_words(fields, message):
    with pytest.raises((ValueError, TypeError), match=message):
        lk.QuantConfig(**fields)


FIELDS = {
    "format": "int4",
    "group_size": 128,
    "rank": 8,
    "lora_alpha": 12.5,
    "use_rslora": True,
    "adapter_dtype": torch.bfloat16,
    "init": "aser",
    "num_iter": 3,
    "svd": "exact",
    "rank_energy": 0.5,
    "outlier_channels": 7,
    "scale_dtype": torch.float32,
    "scale_search": True,
    "seed": 2**64 - 1,
    "include": ("a.*", "re:b[0-9]"),
    "exclude": ("a.c",),
    "overrides": {"a.b": {"scale_dtype": torch.bfloat16, "rank": None, "adapter_dtype": torch.float64}, "a.*": None},
    "layer_types": ("conv", "linear"),
    "modules_to_save": ("head",),
    "quantize_head": True,
}
OTHERS = [{name: value} for name, value in FIELDS.items() if name != "rank_energy"]
OTHERS += [
    {"init": "aser", "rank_energy": 0.5},
    {"order": "svd_first"},
    {"adapter": "qalora"},
    {"rank": None},
    FIELDS,
    {},
]


def fields_of(cls: type) -> list[dict]:
    known = set(cls.__dataclass_fields__)
    return [fields for fields in OTHERS if set(fields) <= known]


@pytest.mark.parametrize(
    ("cls", "fields"), [(cls, own) for cls in (lk.LayerConfig, lk.QuantConfig) for own in fields_of(cls)], ids=str
)
class TestValues:
    def test_copies_are_equal(self, cls, fields):
        cfg = cls(**fields)
        through_json = cls.from_dict(json.loads(json.dumps(cfg.to_dict())))
        for twin in (through_json, pickle.loads(pickle.dumps(cfg)), copy.deepcopy(cfg), cls(**fields)):
            assert twin == cfg and hash(twin) == hash(cfg) and twin.to_dict() == cfg.to_dict()
            assert all(type(getattr(twin, name)) is type(getattr(cfg, name)) for name in cls.__dataclass_fields__)
        assert {name: getattr(through_json, name) for name in fields} == fields

    def test_a_field_makes_a_difference(self, cls, fields):
        same = fields == {} or cls(**fields).to_dict() == cls().to_dict()
        assert (cls(**fields) == cls()) == same and len({cls(**fields), cls()}) == (1 if same else 2)


def test_every_field_is_tried():
    assert {name for fields in OTHERS for name in fields} == set(lk.QuantConfig.__dataclass_fields__)


def test_equality():
    """The first override that matches wins, so that their order is part of a config; numbers are equal as numbers."""
    changes = {"rank": 2, "format": "nf2"}
    first = lk.QuantConfig(overrides={"a": None, "*": changes})
    assert first != lk.QuantConfig(overrides={"*": changes, "a": None})
    assert first == lk.QuantConfig(overrides={"a": None, "*": dict(reversed(changes.items()))})
    one, two = lk.QuantConfig(lora_alpha=16), lk.QuantConfig(lora_alpha=16.0)
    assert one == two and hash(one) == hash(two)
    assert lk.QuantConfig() != lk.LayerConfig() and lk.QuantConfig() != "nf4"


def test_what_was_passed_in_is_copied():
    changes, patterns = {"rank": 2}, ["a"]
    overrides = {"b": changes}
    cfg = lk.QuantConfig(overrides=overrides, exclude=patterns)
    before = hash(cfg)
    changes["rank"], overrides["c"] = 3, None
    patterns.append("d")
    assert cfg.overrides == {"b": {"rank": 2}} and cfg.exclude == ("a",) and hash(cfg) == before
    values = cfg.to_dict()
    values["overrides"]["b"]["rank"] = 9
    assert cfg.for_layer("b").rank == 2


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (lk.QuantConfig, {"colour": 1, "rank": 2}, "QuantConfig has no field colour"),
        (lk.LayerConfig, {"exclude": []}, "LayerConfig has no field exclude"),
        (lk.QuantConfig, {"overrides": {"a": {"colour": 1}}}, "override 'a' sets colour"),
        (lk.QuantConfig, {"overrides": {"a": 3}}, "override 'a' must be a format, a dict"),
        (lk.QuantConfig, {"overrides": 3}, "overrides must map"),
        (lk.QuantConfig, {"scale_dtype": "int8"}, "scale_dtype='int8'"),
    ],
)
def test_from_dict_refuses(cls, values, message):
    with pytest.raises((ValueError, TypeError), match=message):
        cls.from_dict(values)


class TestNumbersOfNumpy:
    """They are taken wherever Python's are, and kept as Python's."""

    @pytest.mark.parametrize("kind", [numpy.int64, numpy.int32, numpy.uint8])
    @pytest.mark.parametrize("name", ["group_size", "rank", "num_iter", "seed", "outlier_channels", "lora_alpha"])
    def test_integers(self, name, kind):
        self.check(name, kind(64), 64)

    @pytest.mark.parametrize(
        ("name", "value", "plain"),
        [
            ("lora_alpha", numpy.float64(16.5), 16.5),
            ("lora_alpha", numpy.float32(0.5), 0.5),
            ("use_rslora", numpy.bool_(True), True),
            ("scale_search", numpy.bool_(True), True),
            ("format", numpy.str_("nf2"), "nf2"),
        ],
        ids=str,
    )
    def test_others(self, name, value, plain):
        self.check(name, value, plain)

    def check(self, name, value, plain):
        cfg = lk.QuantConfig(**{name: value}, overrides={"a": {name: value}})
        for stored in (getattr(cfg, name), cfg.overrides["a"][name], getattr(cfg.for_layer("a"), name)):
            assert type(stored) is type(plain) and stored == plain
        assert cfg == lk.QuantConfig.from_dict(json.loads(json.dumps(cfg.to_dict())))

    def test_rank_energy_and_quantize_head(self):
        cfg = lk.QuantConfig(init="aser", rank_energy=numpy.float64(0.5), quantize_head=numpy.bool_(True))
        assert type(cfg.rank_energy) is float and cfg.quantize_head is True

    @pytest.mark.parametrize("value", [numpy.float64(8.0), numpy.bool_(True), numpy.array([8])])
    def test_no_whole_numbers(self, value):
        with pytest.raises(ValueError, match="rank="):
            lk.QuantConfig(rank=value)

    def test_functions(self):
        n, x = numpy.int64, numpy.float64
        weight = torch.randn(64, 128)
        plain = lk.quantize(weight, group_size=32, scale_search=True)
        assert torch.equal(lk.quantize(weight, group_size=n(32), scale_search=numpy.bool_(True)).codes, plain.codes)
        options = {"group_size": n(32), "scaling": x(0.5), "seed": n(3)}
        for init in (
            lk.loftq_init(weight, "nf4", n(4), n(2), **options),
            lk.qlora_init(weight, "nf4", n(4), **options),
            lk.qalora_init(weight, "int4", n(3), n(2), **options),
        ):
            assert init.lora_A.shape[0] in (3, 4) and type(init.packed.group_size) is int
        assert type(lk.quantize(weight, group_size=n(32)).group_size) is int

    def test_layers(self):
        n = numpy.int64
        options = {"rank": n(4), "group_size": n(64), "lora_alpha": numpy.float32(8)}
        layers = [
            lk.QuantLoRALinear(n(128), numpy.int32(64), **options),
            lk.QuantLoRAEmbedding(n(64), n(128), n(-1), **options),
            lk.QuantLoRAConv2d(n(16), n(8), n(3), stride=(n(1), 2), padding=n(1), groups=n(2), **options),
            lk.QuantLoRAConv1d(n(64), n(8), n(1), **options),
        ]
        for layer in layers:
            assert (layer.rank, layer.scaling, layer.group_size) == (4, 2, 64) and type(layer.group_size) is int
        assert layers[1].padding_idx == 63 and type(layers[1].padding_idx) is int
        assert layers[2].stride == (1, 2) and type(layers[2].stride[0]) is type(layers[2].in_channels) is int

    def test_models_that_hold_them(self):
        """Sizes that were computed with NumPy end up in modules' attributes."""
        n = numpy.int64
        model = torch.nn.Sequential(torch.nn.Conv2d(n(64), n(64), n(1)), torch.nn.Embedding(n(64), n(64), n(3)))
        cfg = lk.QuantConfig(rank=4, layer_types=("conv", "embedding"))
        assert len(lk.quantize_model(model, cfg, progress=False).layers) == 2
        assert lk.first_layers(torch.nn.Sequential(*model, *model), n(1), {"rank": n(3)}).keys() == {"0"}

    def test_rilq(self):
        x, n = numpy.float32, numpy.int64
        cfg = lk.RilqConfig(weight=x(0.5), lr=x(0.25), steps=n(3), validation_share=x(0.5), seed=n(3))
        assert cfg == lk.RilqConfig(weight=0.5, lr=0.25, steps=3, validation_share=0.5, seed=3)
        assert all(type(value) in (int, float, bool) for value in vars(cfg).values())


@pytest.mark.parametrize("backend", ["triton", "cuda", "bogus"])
@pytest.mark.parametrize("init", [lk.loftq_init, lk.quantize])
@pytest.mark.parametrize("extension", [True, False])
def test_backends_without_an_initializer(init, backend, extension, monkeypatch):
    """Refused in words, with the compiled extension and without it."""
    if not extension:
        monkeypatch.setattr("loftq_kernels.ops.extension.library", None)
    with pytest.raises(ValueError, match=f"backend='{backend}'"):
        init(torch.randn(64, 64), backend=backend)
