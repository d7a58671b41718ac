"""The search for configurations with a timer and a device that are not there, and the file that remembers it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from loftq_kernels.triton_kernels import autotune, configs  # noqa: E402
from loftq_kernels.triton_kernels.configs import TABLE, Config, Key  # noqa: E402
from loftq_kernels.triton_kernels.device import DEVICES  # noqa: E402

KEY = Key("decode", 90, 4, 8, "tall")
KEYS = (
    KEY,
    Key("decode", 120, 8, 16, "small"),
    Key("prefill", 90, 2, 256, "tall"),
    Key("grad_input", 80, 4, 32, "small"),
)
BEST, OTHER = Config(8, 64, 128, 2, 3, 2), Config(8, 32, 64, 2, 3, 4)
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def device(monkeypatch, tmp_path):
    """Its name, its folder, and a timer that likes BEST."""
    timed = []

    def measure(run):
        timed.append(run())
        return 1.0 if timed[-1] == BEST else 2.0 + len(timed)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "device_name", lambda device: "NVIDIA H200 (fake)")
    monkeypatch.setattr(autotune, "measure", measure)
    monkeypatch.setattr(autotune, "_caches", {})
    return timed


@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 256, -1])
def test_candidates(key, group_size):
    """Valid, different, not larger than the rows, and the table's own first."""
    found = list(configs.candidates(key, group_size))
    assert len(found) == len(set(found)) > 5
    assert all(configs.why_invalid(key.kernel, c, key.bits, key.architecture, group_size) is None for c in found)
    if key.kernel == "decode":
        assert {config.block_m for config in found} == {key.rows}
        assert found[0] == configs.rows_of_table(key)[0].for_group(group_size)


def test_search():
    """Fastest first; configurations that fail or measure nothing are left out, but a broken device raises."""

    def time(run):
        return run()

    times = {BEST: 3.0, OTHER: 2.0, Config(8, 32, 64, 2, 4, 4): math.inf, Config(8, 32, 64, 2, 6, 4): math.nan}

    def run(config):
        if config not in times:
            raise RuntimeError("out of resource: shared memory")
        return times[config]

    found = autotune.search([Config(8, 128, 64, 2, 3, 4), *times], run, time)
    assert list(found.items()) == [(OTHER, 2.0), (BEST, 3.0)]

    def broken(config):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        autotune.search([BEST], broken, time)


def test_tuned_once(device, tmp_path, monkeypatch):
    """A key is searched for once; another process reads what was found."""
    run = lambda config: config  # noqa: E731
    assert autotune.tuned(KEY, 64, DEVICE, run) == BEST
    assert len(device) == len(list(configs.candidates(KEY, 64)))
    assert autotune.tuned(KEY, 64, DEVICE, run) == BEST
    monkeypatch.setattr(autotune, "_caches", {})  # another process
    monkeypatch.setattr(autotune, "measure", None)
    assert autotune.tuned(KEY, 64, DEVICE, run) == BEST
    assert os.listdir(tmp_path / "loftq_kernels" / "autotune") == ["NVIDIA-H200-fake.json"]


def test_groups_that_a_row_cannot_hold_are_the_tables(device):
    """Found for groups of 64: with 256 columns per step, eight stages are more than the shared memory of sm_89."""
    key, config = Key("decode", 89, 8, 16, "tall"), Config(16, 64, 64, 2, 8, 4)
    autotune.cache_of(DEVICE).store(key, config, 1.0)
    assert autotune.tuned(key, 64, DEVICE, None) == config
    assert autotune.tuned(key, 256, DEVICE, None) is None


def test_rows_to_paste(device):
    """They are Python, and what the table then says."""
    autotune.tuned(KEY, 64, DEVICE, lambda config: config)
    lines = autotune.table_rows(autotune.cache_of(DEVICE))
    rows = eval("{\n" + lines + "\n}", {"Key": Key, "Config": Config})
    assert rows == {KEY: (BEST,)}


def test_nothing_works(device):
    """A search without a valid configuration is not repeated."""
    tried = []

    def run(config):
        tried.append(config)
        raise ValueError("no")

    assert autotune.tuned(KEY, 64, DEVICE, run) is None
    count = len(tried)
    assert autotune.tuned(KEY, 64, DEVICE, run) is None and len(tried) == count > 0


def test_two_processes_keep_each_others_rows(tmp_path):
    first, second = (autotune.Cache(tmp_path / "x.json") for _ in range(2))
    first.store(KEY, BEST, 1.0)
    second.store(KEYS[2], TABLE[Key("prefill", 90, 0, 0, "")][0], 2.0)
    assert set(autotune.Cache(tmp_path / "x.json").rows) == {KEY, KEYS[2]}
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"version": 1}', '{"version": 1, "rows": 3}', "\ufeff\x00"])
def test_an_unreadable_file_is_ignored_with_a_warning(text, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.warns(RuntimeWarning, match="ignored"):
        cache = autotune.Cache(path)
    assert cache.rows == {}
    cache.path = tmp_path / "y.json"
    cache.store(KEY, BEST, 1.0)
    assert autotune.Cache(cache.path).rows == {KEY: (BEST, 1.0)}


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"block_m": 8, "block_n": 16, "block_k": 64, "num_warps": 2, "num_stages": 3, "fill": 4}},
        {"config": {"block_m": 8.0, "block_n": 64, "block_k": 64, "num_warps": 2, "num_stages": 3, "fill": 4}},
        {"config": {"block_m": 8}},
        {"config": None},
        {"key": {**KEY._asdict(), "kernel": "encode"}},
        {"key": {**KEY._asdict(), "bits": 3}},
        {"microseconds": "fast"},
    ],
    ids=str,
)
def test_an_invalid_row_is_ignored_with_a_warning(change, tmp_path):
    cache = autotune.Cache(tmp_path / "x.json")
    cache.store(KEYS[1], Config(16, 32, 64, 2, 3, 4), 1.0)
    cache.store(KEY, BEST, 1.0)
    stored = json.loads(cache.path.read_text())
    stored["rows"][0].update(change)
    cache.path.write_text(json.dumps(stored))
    with pytest.warns(RuntimeWarning, match="row that is ignored"):
        assert set(autotune.Cache(cache.path).rows) == {KEYS[1]}


def test_of_another_version_or_unwritable(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"version": 0, "rows": 3}')
    cache = autotune.Cache(path)
    assert cache.rows == {}
    (tmp_path / "file").write_text("")
    cache.path = tmp_path / "file" / "x.json"
    with pytest.warns(RuntimeWarning, match="cannot be"):
        cache.store(KEY, BEST, 1.0)
    assert cache.rows == {KEY: (BEST, 1.0)}


def test_enabled(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.delenv("LOFTQ_AUTOTUNE", raising=False)
    assert not autotune.enabled(DEVICE)
    monkeypatch.setenv("LOFTQ_AUTOTUNE", "1")
    assert autotune.enabled(DEVICE)
    assert not autotune.enabled(torch.device("cpu"))
    for value, on in [("True", True), ("yes", True), ("ON", True), ("0", False), ("no", False), ("", False)]:
        monkeypatch.setenv("LOFTQ_AUTOTUNE", value)
        assert autotune.enabled(DEVICE) == on
    monkeypatch.setenv("LOFTQ_AUTOTUNE", "2")
    with pytest.raises(ValueError, match="LOFTQ_AUTOTUNE=2 is neither on nor off"):
        autotune.enabled(DEVICE)
    monkeypatch.setenv("LOFTQ_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not autotune.enabled(DEVICE)


def test_the_launcher_asks(device, monkeypatch):
    """The backend on a fake device: searched at the first call of a shape class, launched as found."""
    import loftq_kernels as lk
    from loftq_kernels.ops import triton_backend, triton_routes
    from loftq_kernels.triton_kernels import decode_launch

    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append((options["BLOCK_N"], options["TILES"]))

    monkeypatch.setenv("TRITON_INTERPRET", "1")  # for CPU tensors
    monkeypatch.setattr(decode_launch, "decode_linear_kernel", Kernel())
    monkeypatch.setattr(decode_launch, "device_of", lambda device: replace(DEVICES[90], multiprocessors=1))
    monkeypatch.setattr(triton_routes, "_routes", {})
    monkeypatch.setattr(autotune, "enabled", lambda device: True)

    def measure(run):
        run()
        return 1.0 if launched[-1] == (BEST.block_n, BEST.tiles) else 2.0

    monkeypatch.setattr(autotune, "measure", measure)
    packed = lk.quantize(torch.randn(256, 512), backend="reference")
    arguments = packed.codes, packed.scale, packed.offset, packed.codebook, 64, None, None, 1.0, None
    x = torch.randn(1, 512, dtype=torch.float16)
    for rows, searched in ((1, True), (1, False), (3, False)):
        del launched[:]
        triton_backend.qlora_linear(x.expand(rows, 512).contiguous(), *arguments)
        assert (len(launched) > 1) == searched and launched[-1] == (BEST.block_n, BEST.tiles)
