"""`torch.export` and AOTInductor of quantized models: saved here, loaded in a process that has only the ops."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
from documents import blocks_of
from helpers import gaussian, tiny_model
from torch import Tensor, nn

import loftq_kernels as lk
from loftq_kernels.ops import plain_program
from loftq_kernels.ops.constant import Constant

REPOSITORY = Path(__file__).parents[1]
BATCH = torch.export.Dim("batch", min=1, max=512)
ONLY_THE_OPS = """
    import sys, types, torch
    package = types.ModuleType("loftq_kernels")
    package.__path__ = [sys.argv[1]]
    sys.modules["loftq_kernels"] = package
    import loftq_kernels.ops
"""
NOTHING = """
    import sys, torch
    sys.path[:] = [path for path in sys.path if path and path != sys.argv[2]]
    sys.meta_path.insert(0, type("Block", (), {"find_spec": staticmethod(
        lambda name, *_: (_ for _ in ()).throw(ModuleNotFoundError(name)) if name.startswith("loftq_kernels") else None
    )}))
"""


def python(folder: Path, *snippets: str) -> subprocess.CompletedProcess:
    """The snippets in a process of their own, within folder."""
    return subprocess.run(
        [sys.executable, "-c", "\n".join(map(textwrap.dedent, snippets)), str(REPOSITORY / "loftq_kernels")]
        + [str(REPOSITORY)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        timeout=300,
    )


class Kinds(nn.Module):
    """Every kind of layer that is quantized."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 70)
        self.conv = nn.Conv1d(70, 40, 3, padding=1)
        self.out = nn.Linear(40, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2).relu())


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(70, 40), nn.Linear(70, 24)
        self.qk = None

    def join(self) -> Grouped:
        self.qk = lk.QuantLoRALinearGroup([self.q, self.k])
        return self

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.qk(x), -1)


def quantized(model: nn.Module, *arguments, **options) -> nn.Module:
    torch.manual_seed(0)
    lk.quantize_model(model, lk.QuantConfig(*arguments, exclude=(), **options), progress=False)
    for name, parameter in model.named_parameters():
        if "lora" in name:  # Adapters that have been trained.
            parameter.data.add_(gaussian(*parameter.shape, seed=7), alpha=0.05)
    return model.eval()


def merged(model: nn.Module) -> nn.Module:
    lk.merge_adapters(model)
    return model


def cases() -> dict[str, tuple[nn.Module, Tensor]]:
    """Models with an example input of a batch of 5."""
    x, ids = gaussian(5, 64, seed=1), torch.arange(45).view(5, 9)
    qalora = {"group_size": 32, "rank": 2, "adapter": "qalora"}
    return {
        "nf4 with adapters": (quantized(tiny_model(), "nf4", rank=4), x),
        "int2 with adapters": (quantized(tiny_model(), "int2", rank=3, lora_alpha=6), x),
        "nf4 without": (quantized(tiny_model(), "nf4", rank=None), x),
        "group means": (quantized(tiny_model(), "int4", **qalora), x),
        "group means, merged": (merged(quantized(tiny_model(), "int4", **qalora)), x),
        "bfloat16": (quantized(tiny_model().bfloat16(), "nf4", rank=4), x.bfloat16()),
        "a group": (quantized(Grouped(), "nf2", rank=4).join(), gaussian(5, 70, seed=1)),
        "all kinds": (quantized(Kinds(), "int8", rank=4, layer_types=("linear", "conv", "embedding")), ids),
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A folder with every program, and with inputs of three batch sizes and what the models make of them."""
    folder = tmp_path_factory.mktemp("exported")
    for name, (model, x) in cases().items():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: BATCH},))
        torch.export.save(plain_program(program), folder / f"{name}.pt2")
        inputs = [x, x[:1], x.repeat(3, *[1] * (x.dim() - 1))]
        with torch.no_grad():
            torch.save([(batch, model(batch)) for batch in inputs], folder / f"{name}.pt")
    return folder


def test_a_process_with_the_ops_alone(exported):
    """Each program gives the model's bits at each batch size."""
    done = python(
        exported,
        ONLY_THE_OPS,
        """
        from pathlib import Path
        for path in sorted(Path().glob("*.pt2")):
            run = torch.export.load(path).module()
            for x, y in torch.load(path.with_suffix(".pt")):
                print(path.stem, len(x), torch.equal(run(x), y), sep=": ")
        loaded = {name.split(".")[1] for name in sys.modules if name.startswith("loftq_kernels.")}
        assert loaded <= {"ops", "storage", "triton_kernels", "arguments", "threads", "vocabulary"}, loaded
        """,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 * len(cases()) and all(line.endswith(": True") for line in lines), done.stdout


def test_files_hold_no_pickles(exported):
    for path in exported.glob("*.pt2"):
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("weights_config.json"))
            assert not [w for w, meta in json.loads(archive.read(name))["config"].items() if meta["use_pickle"]], path


def test_plain_program_shares_memory():
    model = quantized(tiny_model(), "nf4", rank=2)
    program = torch.export.export(model, (gaussian(2, 64),))
    assert plain_program(program) is program
    state = dict(model.named_parameters())
    for name, tensor in program.state_dict.items():
        assert not isinstance(tensor, Constant) and tensor.data_ptr() == state[name].data_ptr(), name


def test_without_the_ops(exported):
    """The error says which op is missing."""
    done = python(exported, NOTHING, "torch.export.load('nf4 without.pt2')")
    assert done.returncode != 0 and "torch.ops.loftq_kernels.qlora_linear" in done.stderr


@pytest.fixture(scope="module")
def compiled(exported) -> Path:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("AOTInductor needs a C++ compiler")
    for name in ("int2 with adapters", "all kinds"):
        program = torch.export.load(exported / f"{name}.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=str(exported / f"{name}.aoti.pt2"))
    return exported


@pytest.mark.slow
def test_aotinductor(compiled):
    done = python(
        compiled,
        ONLY_THE_OPS,
        """
        from pathlib import Path
        for path in sorted(Path().glob("*.aoti.pt2")):
            run = torch._inductor.aoti_load_package(str(path))
            for x, y in torch.load(path.name.replace(".aoti.pt2", ".pt")):
                torch.testing.assert_close(run(x), y, rtol=1e-5, atol=1e-5)
                print(path.name, len(x))
        """,
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 6, done.stderr


@pytest.mark.slow
def test_aotinductor_without_the_ops(compiled):
    done = python(
        compiled,
        NOTHING,
        """
        x, _ = torch.load("int2 with adapters.pt")[0]
        torch._inductor.aoti_load_package("int2 with adapters.aoti.pt2")(x)
        """,
    )
    assert done.returncode != 0 and "Could not find schema for loftq_kernels::qlora_linear" in done.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """A folder with the C++ program of docs/vendoring.md, compiled, and with a package for it."""
    folder = tmp_path_factory.mktemp("program")
    (source,) = (block.text for block in blocks_of("docs/vendoring.md") if "AOTIModelPackageLoader" in block.text)
    (folder / "run.cpp").write_text(source)
    commands = [block.text for block in blocks_of("docs/vendoring.md") if block.first.startswith("c++ ")]
    done = subprocess.run(
        ["sh", "-ec", *commands],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "TORCH": str(Path(torch.__file__).parent)},
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no c++")
def test_a_program_without_python_runs_the_package(program, torch_library):
    model = nn.Sequential(nn.Linear(200, 96), nn.ReLU(), nn.Linear(96, 7))
    exported = torch.export.export(quantized(model, "nf4", rank=8), (gaussian(3, 200),), dynamic_shapes=({0: BATCH},))
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(program / "compiled.pt2"))
    run = ["./run", str(torch_library), package]
    done = subprocess.run(run, cwd=program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    y = torch.tensor([float(line) for line in done.stdout.split()]).view(2, 7)
    torch.testing.assert_close(y, model(torch.ones(2, 200)).detach(), rtol=1e-5, atol=1e-5)
    without = subprocess.run([run[0], "libm.so.6", package], cwd=program, capture_output=True, text=True)
    assert without.returncode != 0 and "Could not find schema for loftq_kernels::qlora_linear" in without.stderr


@pytest.mark.slow
def test_a_python_with_the_library_alone(exported, torch_library):
    done = python(
        exported,
        NOTHING,
        f"""
        torch.ops.load_library({str(torch_library)!r})
        for name in ("nf4 with adapters", "int2 with adapters", "nf4 without", "bfloat16"):
            run = torch.export.load(f"{{name}}.pt2").module()
            for x, y in torch.load(f"{{name}}.pt"):
                assert torch.equal(run(x), y), name
        print("equal")
        """,
    )
    assert done.stdout.strip() == "equal", done.stderr
