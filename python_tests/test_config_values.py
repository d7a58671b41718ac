"""`QuantConfig` as a value: it cannot be changed, and what it cannot hold is refused in words."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import numpy
import pytest
import torch

import loftq_kernels as lk


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": 3}, "layer_types=3 must hold some of"),
        ({"layer_types": [["linear"]]}, r"layer_types=\[\['linear'\]\] must hold some of"),
        ({"include": 5}, "include must be a pattern or a tuple of them, got 5"),
        ({"include": b"a"}, "include must be a pattern or a tuple of them, got b'a'"),
        ({"exclude": {"a": 1}}, "exclude must be a pattern or a tuple of them, got {'a': 1}"),
        ({"overrides": {"*": 3}}, r"override '\*' must be a format, a dict of changed fields, .* got 3"),
        ({"overrides": {"*": {3: 4}}}, r"override '\*' sets 3; it can set"),
        ({"overrides": {"*": {"init": ["loftq"]}}}, r"unknown init \['loftq'\]"),
        ({"overrides": {"*": {"init": "pissa"}}}, "unknown init 'pissa'"),
    ],
    ids=str,
)
def test_refused_in_words(fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        lk.QuantConfig(**fields)


@pytest.mark.parametrize("cls", [lk.LayerConfig, lk.QuantConfig])
@pytest.mark.parametrize("values", [3, None, [], "rank"])
def test_from_dict_of_no_mapping(cls, values):
    with pytest.raises(TypeError, match=f"{cls.__name__}.from_dict takes a mapping of fields to values, got"):
        cls.from_dict(values)


@pytest.mark.parametrize("cls", [lk.LayerConfig, lk.QuantConfig])
def test_from_dict_of_other_keys(cls):
    with pytest.raises(ValueError, match=f"{cls.__name__} has no field 3, colour"):
        cls.from_dict({3: 4, "colour": 5})


class TestOverridesStay:
    CHANGES = {
        "item": lambda d: d.__setitem__("b", None),
        "in place": lambda d: d.__ior__({"b": None}),
        "delete": lambda d: d.__delitem__(next(iter(d))),
        "update": lambda d: d.update({"b": None}),
        "setdefault": lambda d: d.setdefault("b", None),
        "pop": lambda d: d.pop(next(iter(d))),
        "popitem": lambda d: d.popitem(),
        "clear": lambda d: d.clear(),
    }

    @pytest.mark.parametrize("change", CHANGES)
    @pytest.mark.parametrize("inner", [False, True])
    def test_changes_are_refused(self, change, inner):
        cfg = lk.QuantConfig(overrides={"a": {"rank": 2}})
        before = hash(cfg)
        with pytest.raises(TypeError, match=r"cannot be changed: make another, dataclasses\.replace"):
            self.CHANGES[change](cfg.overrides["a"] if inner else cfg.overrides)
        assert cfg.overrides == {"a": {"rank": 2}} and hash(cfg) == before

    def test_copies_stay_too(self):
        cfg = lk.QuantConfig(overrides={"a": {"rank": numpy.int64(2), "scale_dtype": torch.float32}, "b": None})
        twins = [pickle.loads(pickle.dumps(cfg)), copy.deepcopy(cfg), copy.copy(cfg), dataclasses.replace(cfg, seed=0)]
        for twin in [*twins, lk.QuantConfig.from_dict(json.loads(json.dumps(cfg.to_dict())))]:
            assert twin == cfg and hash(twin) == hash(cfg) and list(twin.overrides) == ["a", "b"]
            with pytest.raises(TypeError, match="cannot be changed"):
                twin.overrides["a"]["rank"] = 3

    def test_they_are_dicts_to_everybody_else(self):
        cfg = lk.QuantConfig(overrides={"a": {"rank": 2}})
        assert isinstance(cfg.overrides, dict) and json.dumps(cfg.overrides) == '{"a": {"rank": 2}}'
        assert dataclasses.replace(cfg, overrides={**cfg.overrides, "b": None}).for_layer("b") is None
        assert repr(cfg.overrides) == "{'a': {'rank': 2}}" and cfg.overrides.copy() == cfg.overrides
