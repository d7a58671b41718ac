"""What writers that were killed have left: the next save removes it, and nothing that anybody still writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import TinyModel, gaussian, tiny_model

import loftq_kernels as lk
from loftq_kernels.checkpoints import dense
from loftq_kernels.checkpoints.manifest import CONFIG_NAME
from loftq_kernels.storage import files
from loftq_kernels.tuning import state

pytest.importorskip("safetensors")
X = gaussian(3, 64)
SCRIPT = """
import os, signal, sys
from pathlib import Path
import safetensors.torch
sys.path.insert(0, {tests!r})
from helpers import gaussian, tiny_model
import loftq_kernels as lk
from loftq_kernels.storage import files

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def half(tensors, path, **_):
    Path(path).write_bytes(b"half" * 1000)
    die()

unlink, replace, write_text = Path.unlink, os.replace, Path.write_text

def write_half(self, text, **options):
    if "loftq_config" not in self.name:
        return write_text(self, text, **options)
    write_text(self, text[: len(text) // 2], **options)
    die()

def before(name):
    return lambda source, target: die() if Path(target).name == name else replace(source, target)

def unlink_or_die(self, **options):
    die() if self.name.startswith("model-") else unlink(self, **options)

{patch}
{save}
"""
SAVE_MODEL = """
model = tiny_model(5)
lk.quantize_model(model, lk.QuantConfig(rank=4, num_iter=1), progress=False)
lk.save_quantized(model, {folder!r})
"""
POINTS = {
    "writing the tensors": "safetensors.torch.save_file = half",
    "before the tensors have their name": "Path.replace = die",
    "after that": "files_write = lk.checkpoints.native.documents; files_write.write_text = die",
    "writing the config": "Path.write_text = write_half",
    "before the config has its name": "os.replace = before('loftq_config.json')",
    "before the old tensors are removed": "Path.unlink = unlink_or_die",
}


def quantized(seed: int = 0) -> TinyModel:
    model = tiny_model(seed)
    lk.quantize_model(model, lk.QuantConfig(rank=4, num_iter=1), progress=False)
    return model


def run_killed(patch: str, save: str) -> None:
    script = SCRIPT.format(tests=str(Path(__file__).parent), patch=patch, save=save)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def load(folder: Path) -> torch.Tensor:
    return lk.load_quantized(folder, tiny_model(9))(X)


@pytest.mark.parametrize("old", [True, False], ids=["over another", "first"])
@pytest.mark.parametrize("point", POINTS)
def test_killed_save(point, old, tmp_path):
    """Before: what loads is the old model or, once its config is in place, the new one. After: two files."""
    if point == "before the old tensors are removed" and not old:
        pytest.skip("there are none")
    expected = None
    if old:
        lk.save_quantized(quantized(), tmp_path)
        expected = quantized()(X)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model-0123456789ab.safetensors").write_text("somebody else's")
    before = names(tmp_path)
    run_killed(POINTS[point], SAVE_MODEL.format(folder=str(tmp_path)))
    assert names(tmp_path) - before, "something is left behind"
    if point == "before the old tensors are removed":
        expected = quantized(5)(X)
    if expected is None:
        with pytest.raises(FileNotFoundError, match="is not a quantized checkpoint"):
            load(tmp_path)
    else:
        assert torch.equal(load(tmp_path), expected)
    lk.save_quantized(quantized(7), tmp_path)
    assert torch.equal(load(tmp_path), quantized(7)(X))
    others = {"tokenizer.json", "model-0123456789ab.safetensors"}
    left = names(tmp_path) - others
    assert len(left) == 2 and CONFIG_NAME in left and others < names(tmp_path)


def test_an_unfinished_folder_is_no_dense_model(tmp_path):
    run_killed(POINTS["writing the config"], SAVE_MODEL.format(folder=str(tmp_path)))
    with pytest.raises(ValueError, match=f"packed weights.*without a {CONFIG_NAME}: an unfinished save"):
        dense.load_dense(tmp_path, layers=["*"])


def test_a_live_writer_is_left_alone(tmp_path):
    """Another process that is saving the same folder, this one's other threads, and other machines."""
    host = files._machine()
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        living = [f".tensors.{host}.{sleeper.pid}-0.tmp", f".{CONFIG_NAME}.{host}.{sleeper.pid}-1.tmp"]
        living += [".tensors.elsewhere.1-0.tmp", f".unfinished.{host}.{sleeper.pid}-2.tmp"]
        for name in living:
            (tmp_path / name).write_text("model-0123456789ab.safetensors")
        (tmp_path / "model-0123456789ab.safetensors").write_text("just renamed")
        with files.replacing(tmp_path / CONFIG_NAME) as mine:
            mine.write_text("half")
            lk.save_quantized(quantized(), tmp_path)
            assert mine.read_text() == "half"
            mine.unlink()
        assert {*living, "model-0123456789ab.safetensors"} < names(tmp_path)
    finally:
        sleeper.kill()
        sleeper.wait()
    lk.save_quantized(quantized(), tmp_path)
    assert len(names(tmp_path)) == 3 and ".tensors.elsewhere.1-0.tmp" in names(tmp_path)
    long_ago = time.time() - 3 * 24 * 3600
    os.utime(tmp_path / ".tensors.elsewhere.1-0.tmp", (long_ago, long_ago))
    lk.save_quantized(quantized(), tmp_path)
    assert len(names(tmp_path)) == 2


def test_a_former_process_of_the_same_number(tmp_path):
    """The first process of a container always has the same."""
    left = tmp_path / f".file.{files._machine()}.{os.getpid()}-0.tmp"
    left.write_text("half")
    with files.replacing(tmp_path / "file") as temporary:
        assert not left.exists()
        temporary.write_text("whole")
    assert names(tmp_path) == {"file"}


SAVERS = {
    "packed": ("lk.quantize(gaussian(8, 64)).save({file!r})", lambda f: lk.quantize(gaussian(8, 64)).save(f)),
    "statistics": (
        "lk.ActivationStatistics({{'a': lk.InputStatistics.from_inputs(gaussian(99, 64))}}).save({file!r})",
        lambda f: lk.ActivationStatistics({"a": lk.InputStatistics.from_inputs(gaussian(99, 64))}).save(f),
    ),
}


@pytest.mark.parametrize("saver", SAVERS)
def test_other_savers(saver, tmp_path):
    script, save = SAVERS[saver]
    file = tmp_path / "file"
    run_killed(POINTS["writing the tensors"], script.format(file=str(file)))
    assert names(tmp_path) and not file.exists()
    save(file)
    assert names(tmp_path) == {"file"}


def test_plan(tmp_path):
    model, file = tiny_model(), tmp_path / "plan.json"
    lk.plan_bits(model, 4, ("nf2", "nf4"), lk.QuantConfig(rank=4, num_iter=1), progress=False).save(tmp_path / "source")
    save = f"lk.BitPlan.load({str(tmp_path / 'source')!r}).save({str(file)!r})"
    run_killed(f"os.replace = before({file.name!r})", save)
    assert len(names(tmp_path)) == 2 and not file.exists()
    lk.BitPlan.load(tmp_path / "source").save(file)
    assert names(tmp_path) == {"source", "plan.json"}


def test_tuning_state(tmp_path):
    """The state that follows has another name than the one that was cut short."""
    script = "from loftq_kernels.tuning import state\nstate.save(Path({folder!r}), {{}}, state.RilqProgress(step=3), "
    script += "{{'a': gaussian(4)}})"
    run_killed(POINTS["writing the tensors"], script.format(folder=str(tmp_path)))
    assert any("state-3" in name for name in names(tmp_path))
    state.save(tmp_path, {}, state.RilqProgress(step=5), {"a": gaussian(4)})
    assert names(tmp_path) == {"rilq.json", "state-5.safetensors"}


def test_teacher_cache(tmp_path):
    """A teacher's states that are wanted no longer are among what is removed."""
    script = "import torch\nlk.cache_teacher(torch.nn.Linear(64, 64), [gaussian(2, 64)], {folder!r}, progress=False)"
    run_killed(
        POINTS["writing the tensors"], "import torch\ntorch.manual_seed(0)\n" + script.format(folder=str(tmp_path))
    )
    assert any(name.endswith(".tmp") for name in names(tmp_path))
    torch.manual_seed(0)
    lk.cache_teacher(torch.nn.Linear(64, 64), [gaussian(2, 64, seed=1)], tmp_path, progress=False)
    assert len(names(tmp_path)) == 2 and not any(name.endswith(".tmp") for name in names(tmp_path))
