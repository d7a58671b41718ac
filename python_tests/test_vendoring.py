"""What other packages take of this one: documented schemas, a copy of triton_kernels/, a kernel of the Hub."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from documents import blocks_of
from test_ops import samples

from loftq_kernels.ops import schemas
from loftq_kernels.storage import packing
from loftq_kernels.triton_kernels import autotune, contract

HERE = Path(__file__).parent
REPOSITORY = HERE.parent
KERNELS = REPOSITORY / "loftq_kernels" / "triton_kernels"


def run(*arguments, folder: Path, **environment: str) -> str:
    """A process in which Triton interprets, and which finds this package only where it is asked to."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", **environment},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_documented_schemas():
    """docs/vendoring.md has a section of every op, with the schema that is registered, and of no other."""
    text = (REPOSITORY / "docs" / "vendoring.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^### (\w+)\n`(.+)`$", text, re.M))
    registered = {name: str(getattr(torch.ops.loftq_kernels, name).default._schema) for name in schemas.names()}
    assert documented == registered


def documented_rows() -> dict[str, tuple[str, str]]:
    """What docs/vendoring.md says of each op's derivatives and of vmap."""
    text = (REPOSITORY / "docs" / "vendoring.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| op \| derivatives \| vmap \|\n((?:\|.*\n)+)", text, re.M)
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (.+?) \| (.+?) \|$", table, re.M)
    return {name: (derivatives, vmap) for names, derivatives, vmap in rows for name in re.findall(r"`(\w+)`", names)}


@pytest.mark.parametrize("name", schemas.names())
def test_documented_derivatives_and_vmap(name):
    assert documented_rows().keys() == set(schemas.names())
    derivatives, vmap = documented_rows()[name]
    op = getattr(torch.ops.loftq_kernels, name)
    first, *rest = (a.detach() if isinstance(a, torch.Tensor) else a for a in samples(name)[0])
    mapped = torch.vmap(lambda one: op(one, *rest))
    with pytest.raises(RuntimeError) if vmap == "RuntimeError" else contextlib.nullcontext():
        mapped(torch.stack([first, first]))
    arguments = [first, *rest]
    at = next((i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) and a.is_floating_point()), None)
    if at is None or derivatives == "none":
        return
    arguments[at].requires_grad_()
    with pytest.raises(RuntimeError) if derivatives.startswith("none: RuntimeError") else contextlib.nullcontext():
        assert op(*arguments).requires_grad


@pytest.mark.parametrize("bits", packing.BITS)
def test_contract(bits):
    """What triton_kernels/ states again is what storage/ says."""
    assert (contract.TILE, contract.BITS, contract.GROUP_SIZES) == (packing.TILE, packing.BITS, packing.GROUP_SIZES)
    assert contract.code_bits(2**bits) == contract.bits_of(torch.empty(2**bits)) == packing.code_bits(2**bits) == bits
    for columns in (0, 1, 31, 32, 63, 64, 65, 200, 4096):
        assert contract.row_bytes(columns, bits) == packing.row_bytes(columns, bits)
        for group_size in packing.GROUP_SIZES:
            assert contract.num_groups(columns, group_size) == packing.num_groups(columns, group_size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("elsewhere")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(KERNELS, folder / "some_pkg" / "vendored", ignore=ignore)
    (folder / "some_pkg" / "__init__.py").touch()
    return folder


class TestACopyOfTheKernels:
    """triton_kernels/ in a package of another name, at another depth."""

    @pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside the original"])
    def test_is_right(self, folder, beside):
        environment = {"PYTHONPATH": str(REPOSITORY)} if beside else {}
        out = run(HERE / "vendored.py", folder, "some_pkg.vendored", *["beside"] * beside, folder=folder, **environment)
        errors = json.loads(out)
        assert len(errors) == 18
        for name, (ours, plain) in errors.items():
            assert ours <= 1.2 * plain + 1e-5, (name, ours, plain)

    def test_keeps_its_own_cache(self, folder):
        code = """
            from some_pkg.vendored import autotune
            print(autotune.folder())
        """
        cache = run("-c", textwrap.dedent(code), folder=folder, XDG_CACHE_HOME=str(folder))
        assert cache.strip() == str(folder / "some_pkg" / "autotune")
        assert autotune.folder().parts[-2:] == ("loftq_kernels", "autotune")

    def test_every_module_is_imported_without_the_package(self, folder):
        modules = [path.stem for path in KERNELS.glob("*.py")]
        code = f"""
            import importlib, sys
            sys.modules["loftq_kernels"] = None
            for name in {modules}:
                importlib.import_module("some_pkg.vendored." + name if name != "__init__" else "some_pkg.vendored")
        """
        run("-c", textwrap.dedent(code), folder=folder)

    def test_refuses_what_does_not_fit(self, folder):
        code = """
            import interpreter
            interpreter.repair()
            import torch
            from some_pkg.vendored.functional import dequantize, qlora_linear, qlora_linear_grad_input
            K, N = 70, 9
            good = dict(x=torch.zeros(2, K), codes=torch.zeros(N, 64, dtype=torch.uint8), scale=torch.ones(N, 2),
                        offset=None, codebook=torch.zeros(16), group_size=64)
            wrong = [("x", torch.zeros(2, 200)), ("x", torch.zeros(2, K).double()), ("x", torch.zeros(())),
                     ("codes", torch.zeros(N, 64)), ("codes", torch.zeros(N, 32, dtype=torch.uint8)),
                     ("scale", torch.ones(N, 1)), ("scale", torch.ones(N, 2).double()), ("scale", torch.ones(N + 1, 2)),
                     ("offset", torch.ones(N, 2).half()), ("offset", torch.ones(N, 3)),
                     ("codebook", torch.zeros(15)), ("codebook", torch.zeros(2)), ("codebook", torch.zeros(16).half()),
                     ("group_size", 48), ("bias", torch.zeros(N + 1)), ("lora_A", torch.zeros(3, K)),
                     ("adapter_ids", torch.zeros(2, dtype=torch.int64))]
            lora = dict(lora_A=torch.zeros(3, K), lora_B=torch.zeros(N, 3))
            pairs = [dict([pair]) for pair in wrong]
            pairs += [{**lora, "lora_A": torch.zeros(3, K + 1)}, {**lora, "lora_B": torch.zeros(N, 4)},
                      {**lora, "adapter_ids": torch.zeros(2, dtype=torch.int64)}]
            for change in pairs:
                try:
                    qlora_linear(**{**good, **change})
                except ValueError as error:
                    print(error)
                else:
                    raise AssertionError(change)
            stored = [good[name] for name in ("codes", "scale", "offset", "codebook")]
            for call in (lambda: dequantize(*stored, K, 64, torch.float64),
                         lambda: dequantize(*stored, 200, 64, torch.half),
                         lambda: qlora_linear_grad_input(torch.zeros(2, N + 1), *stored, K, 64)):
                try:
                    call()
                except ValueError as error:
                    print(error)
                else:
                    raise AssertionError(call)
            ids = torch.zeros(2, dtype=torch.int64)
            stack = {name: t.unsqueeze(0).requires_grad_() for name, t in lora.items()}
            try:
                qlora_linear(**good, **stack, adapter_ids=ids)
            except RuntimeError as error:
                print(error)
            assert qlora_linear(**good, **lora).shape == (2, N)
        """
        out = run("-c", textwrap.dedent(code), folder=folder, PYTHONPATH=str(HERE))
        assert len(out.splitlines()) == 24 and "no_grad" in out

    def test_says_that_it_needs_a_gpu(self, folder):
        code = """
            import torch
            from some_pkg.vendored.functional import dequantize
            try:
                codes = torch.zeros(1, 32, dtype=torch.uint8)
                dequantize(codes, torch.ones(1, 1), None, torch.zeros(16), 64, 64, torch.half)
            except ValueError as error:
                print(error)
        """
        assert "CUDA tensors" in run("-c", textwrap.dedent(code), folder=folder, TRITON_INTERPRET="0")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "hf-kernel"
    run(REPOSITORY / "hub" / "build.py", folder, folder=folder.parent)
    return folder


class TestTheKernelOfTheHub:
    def test_layout(self, kernel):
        """Every file of triton_kernels/ is in the source and in each variant, with its hash; imports stay inside."""
        files = {path.name for path in KERNELS.glob("*.py")}
        package = {"__init__.py", *(f"triton_kernels/{name}" for name in files)}
        assert package == set(_files(kernel / "torch-ext" / "loftq_triton"))
        for variant in ("torch-cuda", "torch-universal"):
            metadata = json.loads((kernel / "build" / variant / "metadata.json").read_text())
            found = set(_files(kernel / "build" / variant))
            assert found == package | {"metadata.json", "loftq_triton/__init__.py"}
            assert metadata["digest"]["files"].keys() == found - {"metadata.json"} and metadata["id"].isidentifier()
        for path in (kernel / "torch-ext").rglob("*.py"):
            assert _absolute_imports(path) <= {*sys.stdlib_module_names, "torch", "triton"}, path

    def test_is_built_again_over_itself_alone(self, kernel, tmp_path):
        before = {name: (kernel / name).read_bytes() for name in _files(kernel)}
        run(REPOSITORY / "hub" / "build.py", kernel, folder=tmp_path)
        assert before == {name: (kernel / name).read_bytes() for name in _files(kernel)}
        (tmp_path / "precious").touch()
        with pytest.raises(AssertionError, match="holds other files"):
            run(REPOSITORY / "hub" / "build.py", tmp_path, folder=tmp_path)
        assert (tmp_path / "precious").exists()

    def test_loads_where_old_versions_look(self, kernel):
        code = f"""
            import sys
            sys.path.insert(0, {str(kernel / "build" / "torch-universal")!r})
            import loftq_triton
            assert loftq_triton.__all__ == ["dequantize", "qlora_linear", "qlora_linear_grad_input"]
            assert callable(loftq_triton.qlora_linear)
        """
        pytest.importorskip("triton")
        run("-c", textwrap.dedent(code), folder=kernel)

    @pytest.mark.skipif(importlib.util.find_spec("kernels") is None, reason="needs: pip install kernels")
    def test_get_kernel(self, kernel):
        """The package `kernels` reads build file, metadata and hashes; its card's example gives the right numbers."""
        pytest.importorskip("triton")
        (example,) = (block.text for block in blocks_of("hub/README.md") if block.language == "python")
        code = f"""
            import sys
            sys.modules["loftq_kernels"] = None
            sys.path.insert(0, {str(HERE)!r})
            import interpreter
            interpreter.repair()
            from pathlib import Path
            import kernels, torch
            from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
            folder = Path({str(kernel)!r})
            print(Build.open(folder).general.backends)
            for variant in (folder / "build").iterdir():
                metadata = Metadata.read_from_file(variant / "metadata.json")
                metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
            local = kernels.get_local_kernel(folder)
            torch.manual_seed(0)
            device = "cpu"
            exec({example!r})
            assert loftq.qlora_linear is local.qlora_linear and y.shape == (3, N)
            exact = x.double() @ weight.double().T  # lora_B is zero
            assert (y.double() - exact).norm() < 0.01 * exact.norm()
            summed = weight.double().sum(0).expand(3, K)
            assert (x.grad.double() - summed).norm() < 0.01 * summed.norm()
        """
        local = f"YOUR_ORG/loftq-triton={kernel}"
        assert "Backend.CUDA" in run("-c", textwrap.dedent(code), folder=kernel, LOCAL_KERNELS=local)


def _files(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _absolute_imports(path: Path) -> set[str]:
    """The packages that a file imports by their names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names
