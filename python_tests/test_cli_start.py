"""What can be known at the start is told at the start: before a model is loaded, and before anything is written."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import gaussian, load_file, save_file, tiny_bert, tiny_gpt2

import loftq_kernels as lk
from loftq_kernels import cli
from loftq_kernels.checkpoints.manifest import CONFIG_NAME
from loftq_kernels.cli import commands, demo, options, output
from loftq_kernels.models import solve

QUICK = ["--rank", "4", "--num-iter", "1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a transformers model, a plain one, statistics, plans and files of other people."""
    place = tmp_path_factory.mktemp("world")
    model = tiny_bert()
    model.save_pretrained(place / "bert")
    (place / "bert" / "vocab.txt").write_text("words")
    (place / "plain").mkdir()
    tensors = {"embed.weight": gaussian(20, 64), "up.weight": gaussian(96, 64), "up.bias": gaussian(96)}
    save_file(tensors, place / "plain" / "model.safetensors")
    cfg = lk.QuantConfig(exclude="pooler.*")
    known = lk.collect_activations(model, [torch.randint(0, 50, (20, 12))], cfg)
    known.save(place / "calibration")
    narrow = lk.InputStatistics.from_inputs(gaussian(99, 32))
    lk.ActivationStatistics(dict.fromkeys(known, narrow)).save(place / "narrow")
    lk.ActivationStatistics({"up": lk.InputStatistics.from_inputs(gaussian(99, 64))}).save(place / "others")
    plan = lk.plan_bits(model, 4, ["nf2", "nf4"], lk.QuantConfig(rank=4, num_iter=1))
    plan.save(place / "plan.json")
    name = "encoder.layer.0.output.dense"
    layers = {"nobody": plan.layers[name]}
    dataclasses.replace(plan, layers=layers).save(place / "alien.json")
    dataclasses.replace(plan, layers={name: dataclasses.replace(plan.layers[name], shape=(64, 64))}).save(
        place / "reshaped.json"
    )
    lk.quantize_model(model, lk.QuantConfig(rank=4, num_iter=1))
    lk.save_quantized(model, place / "quantized")
    (place / "empty").mkdir()
    (place / "others-folder").mkdir()
    (place / "others-folder" / "thesis.tex").write_text("years of work")
    (place / "text").write_text("words")
    (place / "broken").mkdir()
    (place / "broken" / "model.safetensors").write_bytes(b"\x00" * 20)
    (place / "broken" / "config.json").write_text((place / "bert" / "config.json").read_text())
    return place


@pytest.fixture
def at_work(world, monkeypatch):
    """In the folder of `world`, where everything that takes long fails the test."""
    monkeypatch.chdir(world)

    def work(*_, **__):
        pytest.fail("the work has begun")

    for owner, name in [(options, "load_dense"), (lk, "quantize_model"), (lk, "plan_bits"), (lk, "save_quantized")]:
        monkeypatch.setattr(owner, name, work)
    for owner, name in [(lk, "solve_plan"), (commands, "run_demo"), (demo, "load_model"), (demo, "load_dense")]:
        monkeypatch.setattr(owner, name, work)
    monkeypatch.setattr(sys.modules["loftq_kernels.cli.inspect"], "weight_errors", work)


def contents(place: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}


def said(capsys, *arguments: object) -> str:
    """The one line of a command that ends with status 2."""
    status = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and err.startswith("loftq-kernels: ") and err.count("\n") == 1, err
    return err


INIT = ["--init", "eora"]
QUANTIZE = {
    "the model is not there": (["nowhere", "out"], "nowhere is not a folder"),
    "the model is a file": (["text", "out"], "text is not a folder"),
    "the model's folder is empty": (["empty", "out"], "holds no .safetensors file"),
    "it is quantized": (["quantized", "out"], "already quantized"),
    "its files are damaged": (["broken", "out"], "truncated or corrupted"),
    "no architecture": (["plain", "out"], "--include PATTERN), or give the model"),
    "no matrix by that name": (["plain", "out", "--include", "down"], "'down' matches none of its matrices"),
    "no such class": (["plain", "out", "--model-class", "os:nothing"], "--model-class os:nothing cannot be made"),
    "another class": (["plain", "out", "--model-class", "torch.nn:Identity"], "the files are not those of Identity"),
    "no such device": (["bert", "out", "--device", "warp"], "--device warp cannot be used"),
    "not that device": (["bert", "out", "--device", "cuda:99"], "--device cuda:99 cannot be used"),
    "a device without values": (["bert", "out", "--device", "meta"], "--device meta holds no values"),
    "include nothing": (["bert", "out", "--include", "x"], "--include: the pattern 'x' matches no module"),
    "exclude nothing": (["bert", "out", "--exclude", "x"], "--exclude: the pattern 'x' matches no module"),
    "not a pattern": (["bert", "out", "--include", "re:("], "pattern 're:(' is not a regular expression"),
    "override nothing": (["bert", "out", "--override", "x=nf2"], "--override: the pattern 'x' matches no module"),
    "override in vain": (
        ["bert", "out", "--override", "*=nf2", "--override", "*.query=nf4"],
        "--override: '*' stands before '*.query' and matches all of it",
    ),
    "save nothing": (["bert", "out", "--modules-to-save", "x"], "--modules-to-save: the pattern 'x' matches no module"),
    "no layer left": (["bert", "out", "--exclude", "*"], "no layer to quantize: --include *, --exclude *"),
    "methods disagree": (["bert", "out", "--adapter", "qalora", *INIT], "--adapter qalora takes init of"),
    "an option of another": (["bert", "out", "--rank-energy", ".5"], "--rank-energy 0.5 is for --init aser alone"),
    "no calibration": (["bert", "out", *INIT], "needs --calibration FILE"),
    "no calibration for an override": (
        ["bert", "out", "--override", "*.query=nf4,init=aser"],
        "--init aser of layer 'encoder.layer.0.attention.self.query' needs --calibration FILE",
    ),
    "no calibration, plain": (["plain", "out", *INIT, "--include", "up"], "layer 'up' needs --calibration FILE"),
    "calibration not there": (["bert", "out", *INIT, "--calibration", "nowhere"], "nowhere does not exist"),
    "calibration is text": (["bert", "out", *INIT, "--calibration", "text"], "text is not a readable safetensors file"),
    "calibration is a model": (
        ["bert", "out", *INIT, "--calibration", "bert/model.safetensors"],
        "does not hold activation statistics",
    ),
    "of another model": (["bert", "out", *INIT, "--calibration", "others"], "the statistics lack layer"),
    "of other widths": (["bert", "out", *INIT, "--calibration", "narrow"], "have 32 channels, the weight has 64"),
    "lacks a layer": (["bert", "out", "--calibration", "calibration"], "the statistics lack layer 'pooler.dense'"),
    "the plan is not there": (["bert", "out", "--plan", "nowhere"], "nowhere does not exist"),
    "the plan is text": (["bert", "out", "--plan", "text"], "this is not JSON"),
    "a plan of another model": (["bert", "out", "--plan", "alien.json"], "there is no layer 'nobody'"),
    "a plan of other shapes": (["bert", "out", "--plan", "reshaped.json"], "with shape (64, 64), the model (64, 96)"),
    "output is a file": (["bert", "text"], "text is a file, not a folder"),
    "output in a file": (["bert", "text/out"], "text is not a folder"),
    "output is others'": (["bert", "others-folder"], "is not empty and no checkpoint of ours (it holds thesis.tex)"),
    "output is others', still": (["bert", "others-folder", "--overwrite"], "is not empty and no checkpoint of ours"),
    "output is the model": (["bert", "bert", "--overwrite"], "is not empty and no checkpoint of ours"),
    "output is ours": (["bert", "quantized"], "quantized holds a checkpoint of ours: give --overwrite"),
}
PLAN = {
    "the model is not there": (["nowhere", "new.json"], "nowhere is not a folder"),
    "budget below the least": (["bert", "new.json", "--budget", "2"], "--budget 2 bits per weight is below 2.4271"),
    "budget, of the candidates": (
        ["bert", "new.json", "--budget", "4", "--candidate", "int8"],
        "is below 10.8000, the least that the candidates int8 take (--count packed)",
    ),
    "budget, of the codes": (["bert", "new.json", "--budget", "1.9", "--count", "codes"], "is below 2.0000"),
    "budget, adapters too": (
        ["bert", "new.json", "--budget", "3", "--count", "total", "--rank", "64"],
        "--budget 3 bits per weight is below",
    ),
    "a plan that is not there": (["bert", "new.json", "--from", "nowhere"], "nowhere does not exist"),
    "a plan that is none": (["bert", "new.json", "--from", "text"], "this is not JSON"),
    "measuring nothing": (
        ["bert", "new.json", "--from", "plan.json", "--candidate", "nf2", "--absolute"],
        "--from measures nothing: --candidate, --absolute cannot",
    ),
    "measuring nothing, by any option": (
        ["bert", "new.json", "--from", "plan.json", "--rank", "8", "--format", "nf2", "--device", "cpu"],
        "--from measures nothing: --format, --rank, --device cannot",
    ),
    "ranks without their cost": (
        ["bert", "new.json", "--candidate", "nf2", "--candidate", "nf4,rank=8"],
        "candidates of different ranks need --count total",
    ),
    "twice the same": (["bert", "new.json", "--candidate", "nf2", "--candidate", "nf2"], "'nf2' is given twice"),
    "adapters that do not count": (
        ["bert", "new.json", "--count", "total", "--adapter", "qalora", "--rank", "1"],
        "--count total counts ordinary adapters, but layer",
    ),
    "a rank that no layer has": (["bert", "new.json", "--candidate", "nf2,rank=999"], "no layer to plan"),
    "no such device": (["bert", "new.json", "--device", "warp"], "--device warp cannot be used"),
    "no calibration": (["bert", "new.json", *INIT], "needs --calibration FILE"),
    "of another model": (["bert", "new.json", "--calibration", "others"], "the statistics lack layer"),
    "errors of two kinds": (
        ["bert", "new.json", "--calibration", "calibration", "--exclude", "pooler.*", "--absolute"]
        + ["--layer-type", "linear", "--layer-type", "embedding"],
        "absolute errors of its weights and of other layers' outputs cannot be added",
    ),
    "include nothing": (["bert", "new.json", "--include", "x"], "--include: the pattern 'x' matches no module"),
    "output is a folder": (["bert", "empty"], "empty is a folder, not a file"),
    "output in no folder": (["bert", "nowhere/new.json"], "nowhere is not a folder"),
    "output is others'": (["bert", "text", "--overwrite"], "text exists and is no plan of ours"),
    "output is a manifest": (["bert", "quantized/config.json", "--overwrite"], "exists and is no plan of ours"),
    "output is ours": (["bert", "plan.json"], "plan.json is a plan of ours: give --overwrite"),
}
INSPECT = {
    "not there": (["nowhere"], "nowhere is not a quantized checkpoint"),
    "not quantized": (["bert"], "bert is not a quantized checkpoint"),
    "against nothing": (["quantized", "--against", "nowhere"], "nowhere is not a folder"),
    "against another": (["quantized", "--against", "plain"], "matches none of its matrices"),
    "against itself": (["quantized", "--against", "quantized"], "already quantized"),
}
DEMO = {
    "too many sentences": (["--sentences", "1000000"], "--sentences 1000000: this Python's documentation yields"),
    "output is a file": (["--output", "text"], "text is a file, not a folder"),
    "output is others'": (["--output", "others-folder"], "is not empty and no demo's folder (it holds thesis.tex)"),
    "output is a model": (["--output", "quantized", "--overwrite"], "is not empty and no demo's folder"),
}
TABLE = [
    pytest.param(command, arguments, message, id=f"{command}: {title}")
    for command, table in {"quantize": QUANTIZE, "plan": PLAN, "inspect": INSPECT, "demo": DEMO}.items()
    for title, (arguments, message) in table.items()
]


@pytest.mark.parametrize(("command", "arguments", "message"), TABLE)
def test_before_any_work(world, at_work, capsys, command, arguments, message):
    budget = ["--budget", "4"] if command == "plan" and "--budget" not in arguments else []
    before = contents(world)
    assert message in said(capsys, command, *arguments, *budget)
    assert contents(world) == before and not (world / "out").exists() and not (world / "new.json").exists()


def test_a_plan_solved_again_says_its_least_budget(world, capsys, monkeypatch):
    monkeypatch.chdir(world)
    line = said(capsys, "plan", "bert", "new.json", "--budget", "2", "--from", "plan.json")
    assert "--budget 2 bits per weight is below 2.4271" in line and not (world / "new.json").exists()


@pytest.mark.parametrize(
    ("missing", "arguments", "message"),
    [
        ("scipy.optimize", ["plan", "bert", "new.json", "--budget", "4"], "SciPy: pip install 'loftq_kernels[plan]'"),
        (
            "transformers",
            ["quantize", "bert", "out"],
            "transformers 5.20 or newer is needed: pip install 'loftq_kernels[hf]'",
        ),
        ("transformers", ["demo", "--output", "out"], "the demo needs transformers"),
        ("matplotlib", ["demo", "--output", "out"], "the demo needs matplotlib"),
        ("the model", ["demo", "--output", "out"], "the demo's model is missing; it needs: pip install"),
    ],
)
def test_what_is_not_installed(world, at_work, capsys, monkeypatch, missing, arguments, message):
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "the model":
        monkeypatch.setattr(demo, "_MODEL_PACKAGE", "no_such_package")
    assert message in said(capsys, *arguments) and not (world / "out").exists()


def test_a_disk_without_room(world, at_work, capsys, monkeypatch):
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10_000))
    assert "cannot be written: the result takes" in said(capsys, "quantize", "bert", "out")

    assert "cannot be written: the result takes 60 MiB" in said(capsys, "demo", "--output", "out")


def test_a_place_that_takes_nothing_new(world, at_work, capsys):
    """Permissions do not say so: root has all of them in /proc, which is no place for files."""
    proc = Path("/proc/self/fdinfo")
    if not proc.is_dir():
        pytest.skip("there is no /proc")
    for arguments in (["quantize", "bert"], ["demo", "--output"], ["plan", "bert", "--budget", "4"]):
        assert re.search(
            r"cannot be written: /proc/\w+/fdinfo takes nothing new \(", said(capsys, *arguments, proc / "new")
        )


def test_bytes_of_the_demo():
    """Known without looking at the model, which its package has."""
    demo.minilm_folder() if importlib.util.find_spec(demo._MODEL_PACKAGE) else pytest.skip("its model is not here")
    from loftq_kernels.checkpoints import dense
    from loftq_kernels.cli import preflight
    from loftq_kernels.models.convert import check_quantize

    shapes = dense.outline(demo.minilm_folder(), layers=None)
    tensors = preflight._least_bytes(shapes, check_quantize(shapes, lk.QuantConfig(demo.SAVED[0])))
    assert 0.8 * demo.RESULT_BYTES < tensors < demo.RESULT_BYTES


class TestTheCheckIsNoStricterThanTheWork:
    """What is checked on the outline of a model is what its values would give."""

    @pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("layer_types", [("linear",), ("linear", "embedding")])
    def test_the_same_layers(self, tmp_path, make, dtype, layer_types):
        from loftq_kernels.checkpoints import dense
        from loftq_kernels.models.select import select_layers

        make().to(dtype).save_pretrained(tmp_path)
        cfg = lk.QuantConfig(layer_types=layer_types, overrides={"*.1.*": "int8"})
        real, outline = dense.load_dense(tmp_path), dense.outline(tmp_path)
        selections = [select_layers(real, cfg), select_layers(outline, cfg, values=False)]
        chosen, skipped = zip(*[([c.names for c in s.candidates], s.skipped) for s in selections], strict=True)
        assert chosen[0] == chosen[1] and skipped[0] == skipped[1]
        for mine, theirs in zip(real.state_dict().items(), outline.state_dict().items(), strict=True):
            assert mine[0] == theirs[0] and mine[1].dtype == theirs[1].dtype and mine[1].shape == theirs[1].shape
        assert all(parameter.is_meta for parameter in outline.parameters())

    def test_a_model_that_cannot_be_outlined(self, tmp_path, capsys, monkeypatch):
        """Whatever its constructor does with values, loading decides."""
        from loftq_kernels.checkpoints import dense

        tiny_bert().save_pretrained(tmp_path / "bert")

        class Picky(type(tiny_bert())):
            def __init__(self, config):
                super().__init__(config)
                if self.pooler.dense.weight.is_meta and sys._getframe(1).f_code.co_name == "outline":
                    raise RuntimeError("no values")

        monkeypatch.setattr(dense, "model_class", lambda name: Picky)
        assert dense.outline(tmp_path / "bert") is None
        arguments = ["quantize", tmp_path / "bert", tmp_path / "out"]
        capsys.readouterr()
        assert "--init eora needs --calibration FILE" in said(capsys, *arguments, "--init", "eora")


class TestOverwriting:
    @pytest.fixture
    def bert(self, world) -> Path:
        return world / "bert"

    def quantize(self, capsys, *arguments: object) -> str:
        status = cli.main(["quantize", *map(str, arguments), *QUICK])
        out, err = capsys.readouterr()
        assert status == 0, err
        return out

    @pytest.mark.parametrize("before", ["nothing", "an empty folder", "what a dead writer has left"])
    def test_new_places(self, bert, tmp_path, capsys, before):
        out = tmp_path / "out"
        if before != "nothing":
            out.mkdir()
        if before.startswith("what"):
            left = out / ".tensors.999999999.tmp"
            left.write_bytes(b"half a file")
        self.quantize(capsys, bert, out)
        assert sorted(file.suffix for file in out.iterdir()) == [".json", ".safetensors", ".txt"]

    def test_nothing_of_the_earlier_checkpoint_stays(self, bert, tmp_path, capsys):
        """Files that others have put beside it do."""
        out = tmp_path / "out"
        self.quantize(capsys, bert, out)
        (out / "README.md").write_text("mine")
        self.quantize(capsys, bert, out, "--format", "nf2", "--overwrite")
        assert len(list(out.glob("*.safetensors"))) == 1 and (out / "README.md").read_text() == "mine"
        assert lk.load_quantized(out).pooler.dense.format.name == "nf2"

    def test_companions_of_another_model(self, bert, world, tmp_path, capsys):
        out = tmp_path / "out"
        self.quantize(capsys, bert, out)
        (out / "chat_templates").mkdir()
        (out / "chat_templates" / "tools.jinja").write_text("{{ messages }}")
        line = said(capsys, "quantize", bert, out, "--overwrite", *QUICK)
        assert "chat_templates/tools.jinja, which" in line and "of another model would be mixed in" in line
        line = said(capsys, "quantize", world / "plain", out, "--include", "up", "--overwrite", *QUICK)
        assert "holds chat_templates/tools.jinja, config.json, vocab.txt" in line

    @pytest.mark.parametrize("damage", ["truncated", "of a newer version"])
    def test_a_damaged_checkpoint_is_ours(self, bert, tmp_path, capsys, damage):
        out = tmp_path / "out"
        self.quantize(capsys, bert, out)
        text = (out / "config.json").read_text()
        newer = text.replace('"loftq_format_version": 2', '"loftq_format_version": 99')
        (out / "config.json").write_text(newer if damage != "truncated" else text[:-20])
        assert "give --overwrite" in said(capsys, "quantize", bert, out)
        self.quantize(capsys, bert, out, "--format", "nf2", "--overwrite")
        assert len(list(out.glob("*.safetensors"))) == 1

    def test_plans(self, bert, tmp_path, capsys):
        file, arguments = tmp_path / "plan.json", ["plan", bert, tmp_path / "plan.json", *QUICK]
        assert cli.main([*map(str, arguments), "--budget", "4"]) == 0
        capsys.readouterr()
        assert "give --overwrite" in said(capsys, *arguments, "--budget", 5)
        again = [*map(str, arguments[:3]), "--budget", "5", "--from", str(file), "--overwrite"]
        assert cli.main(again) == 0 and lk.BitPlan.load(file).budget == 5

    def test_a_link_to_a_plan_leads_to_the_new_one(self, world, tmp_path):
        (tmp_path / "real").mkdir()
        file, link = tmp_path / "real" / "plan.json", tmp_path / "link.json"
        shutil.copy(world / "plan.json", file)
        link.symlink_to(Path("real", "plan.json"))
        arguments = ["plan", world / "bert", link, "--budget", 3, "--from", link, "--overwrite"]
        assert cli.main([*map(str, arguments)]) == 0
        assert link.is_symlink() and lk.BitPlan.load(file).budget == 3
        assert [path.name for path in file.parent.iterdir()] == ["plan.json"]

    def test_demos(self, tmp_path, capsys, monkeypatch):
        """An earlier demo's folder is known by its results."""
        reached: list[Callable] = []
        monkeypatch.setattr(commands, "run_demo", lambda path, count: reached.append(path))
        monkeypatch.setattr(sys.modules["loftq_kernels.cli.preflight"], "check_needs", lambda count: None)
        results = {"machine": "x", "sentences": 3, "rows": []}
        (tmp_path / "demo.json").write_text(json.dumps(results))
        assert "holds a demo's folder: give --overwrite" in said(capsys, "demo", "--output", tmp_path)
        assert cli.main(["demo", "--output", str(tmp_path), "--overwrite"]) == 0 and reached == [tmp_path]
        (tmp_path / "demo.json").write_text("[]")
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / CONFIG_NAME).write_text('{"loftq_format_version": 1')
        assert "give --overwrite" in said(capsys, "demo", "--output", tmp_path)
        (tmp_path / "mine").touch()
        assert "is not empty and no demo's folder" in said(capsys, "demo", "--output", tmp_path, "--overwrite")


class TestSaveQuantized:
    """`lk.save_quantized` replaces the checkpoint of a folder, as it says, and leaves everything else alone."""

    @pytest.mark.parametrize("manifest", ["whole", "truncated", "of a newer version"])
    def test_tensor_files_are_not_mixed(self, tmp_path, manifest):
        model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        lk.quantize_model(model, lk.QuantConfig(rank=4, num_iter=1))
        lk.save_quantized(model, tmp_path)
        (first,) = tmp_path.glob("*.safetensors")
        (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"another's")
        text = (tmp_path / CONFIG_NAME).read_text()
        newer = json.dumps({**json.loads(text), "loftq_format_version": 99})
        (tmp_path / CONFIG_NAME).write_text({"whole": text, "truncated": text[:-9]}.get(manifest, newer))
        model[0].lora_B.data += 1
        lk.save_quantized(model, tmp_path)
        named = json.loads((tmp_path / CONFIG_NAME).read_text())["tensor_file"]
        assert named != first.name
        held = {file.name for file in tmp_path.iterdir()}
        assert held == {named, CONFIG_NAME, "model-00001-of-00002.safetensors"}
        assert "0.codes" in load_file(tmp_path / named)


def test_the_budget_is_checked_before_anything_is_measured(monkeypatch):
    """In Python, too."""
    from loftq_kernels.models import allocate

    monkeypatch.setattr(allocate, "_measure", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(ValueError, match=r"budget=2 bits per weight is below 2\.4271"):
        lk.plan_bits(tiny_bert(), 2)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="SciPy: pip install"):
        solve.milp()


@pytest.mark.parametrize("check", [output.check_folder, output.check_file])
def test_a_link_to_nothing_is_no_place_to_write(check, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="is a link to what is not there"):
        check(tmp_path / "link", True, "result", lambda path: True)
