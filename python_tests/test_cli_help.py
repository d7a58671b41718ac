"""Help, versions and misunderstandings: each argument says what it means and its default, and none needs torch."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import loftq_kernels as lk
from loftq_kernels import cli, vocabulary
from loftq_kernels.cli import flags, options, values
from loftq_kernels.cli.parser import make_parser
from loftq_kernels.formats import get_format
from loftq_kernels.initializers.config import METHOD_OPTIONS
from loftq_kernels.initializers.result import ADAPTERS
from loftq_kernels.models.plan import COUNTS
from loftq_kernels.nn.kinds import KINDS
from loftq_kernels.ops.checks import DTYPES_BY_NAME, SCALE_DTYPES_BY_NAME

REPOSITORY = Path(__file__).parents[1]


def commands() -> dict[str, argparse.ArgumentParser]:
    parser = make_parser()
    (action,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {"": parser, **action.choices}


ARGUMENTS = [
    pytest.param(parser, action, id=f"{name} {'/'.join(action.option_strings) or action.dest}".strip())
    for name, parser in commands().items()
    for action in parser._actions
    if not isinstance(action, argparse._SubParsersAction)
]


class TestHelp:
    @pytest.mark.parametrize(("parser", "action"), ARGUMENTS)
    def test_every_argument_says_what_it_means_and_its_default(self, parser, action):
        assert action.help and len(action.help) >= 10
        if isinstance(action, argparse._HelpAction | argparse._VersionAction) or action.required:
            return
        if not action.option_strings:  # A positional that may be left out: the command says what then.
            assert "Without arguments" in parser.description
            return
        said = re.search(r"\(.*default:? (.+)\)$", parser._get_formatter()._expand_help(action))
        assert said, action.help
        if action.default is not None:
            assert said[1] == ("no" if action.default is False else str(action.default))

    @pytest.mark.parametrize("name", [name for name in commands() if name])
    def test_every_command_has_a_description_and_an_example(self, name, capsys):
        parser = commands()[name]
        assert parser.description and f"example:\n  loftq-kernels {name}" in parser.epilog
        example = re.search(rf"loftq-kernels ({name}.*)", parser.epilog)[1]
        if name != "bench":
            assert make_parser().parse_args(shlex.split(example)).command == name

    def test_of_the_choices_each_is_explained(self, capsys):
        with pytest.raises(SystemExit, match="0"):
            cli.main(["quantize", "--help"])
        text = " ".join(capsys.readouterr().out.split())
        for meaning in (*vocabulary.INITIALIZERS.values(), *vocabulary.ADAPTERS.values()):
            assert meaning in text
        for name, word in vocabulary.FORMATS.items():
            assert re.search(rf"\b{name}\b[^:;]*: {re.escape(vocabulary.FORMAT_MEANINGS[word[1:]])}", text), name

    def test_defaults_are_those_of_the_api(self):
        for command, *rest in (["quantize", "model", "out"], ["plan", "model", "file", "--budget", "3"]):
            assert options.config(make_parser().parse_args([command, *rest])) == lk.QuantConfig()
        wanted = options.plan_options(make_parser().parse_args(["plan", "model", "file", "--budget", "3"]))
        defaults = lk.plan_bits.__kwdefaults__
        assert (wanted["count"], wanted["relative"]) == (defaults["count"], defaults["relative"])
        assert tuple(wanted["candidates"]) == lk.plan_bits.__defaults__[0]


def test_the_vocabulary_is_that_of_the_package():
    """What the command line offers without torch is what the package knows with it."""
    assert tuple(vocabulary.FORMATS) == lk.format_names()
    assert all(get_format(n).codebook().numel() == 2 ** vocabulary.FORMATS[n].bits for n in vocabulary.FORMATS)
    assert tuple(vocabulary.INITIALIZERS) == lk.initializer_names()
    assert set(vocabulary.LAYER_TYPES) == {kind.layer_type for kind in KINDS}
    assert tuple(vocabulary.ADAPTERS) == ADAPTERS and tuple(vocabulary.COUNTS) == COUNTS
    assert [getattr(torch, name) for name in vocabulary.SCALE_DTYPES] == list(SCALE_DTYPES_BY_NAME.values())
    assert [getattr(torch, name) for name in vocabulary.DTYPES] == list(DTYPES_BY_NAME.values())
    for size in vocabulary.GROUP_SIZES:
        lk.QuantConfig(group_size=size)
    known = {"format", *vars(lk.QuantConfig()).keys()}
    assert known.issuperset(values.OVERRIDE_FIELDS) and set(values._FIELDS) == set(values.OVERRIDE_FIELDS[1:])
    assert METHOD_OPTIONS.keys() <= known


@pytest.fixture
def without_torch(tmp_path):
    """Runs the command in a process in which importing torch, NumPy or transformers is an error."""
    for name in ("torch", "numpy", "transformers", "safetensors", "scipy", "tqdm"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported')")
    script = tmp_path / "bin" / "loftq-kernels"
    script.parent.mkdir()
    script.write_text("import sys\nfrom _loftq_kernels_command import main\nsys.exit(main())\n")
    starts = {
        "module": ["-m", "loftq_kernels"],
        "joined": ["-Bmloftq_kernels"],
        "folder": ["-m", "loftq_kernels.cli"],
        "script": [str(script)],
    }

    def run(start: str, *arguments: str) -> subprocess.CompletedProcess:
        environment = {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}", "PATH": "/usr/bin:/bin"}
        command = [sys.executable, *starts[start], *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60)

    return run


class TestWithoutTorch:
    """Importing torch takes seconds: help, the version and errors of usage do not wait for it."""

    @pytest.mark.parametrize("start", ["module", "script"])
    @pytest.mark.parametrize("command", [name for name in commands() if name != "bench"])
    def test_help(self, without_torch, start, command):
        done = without_torch(start, *[command] * bool(command), "--help")
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: loftq-kernels")

    @pytest.mark.parametrize("start", ["module", "joined", "folder", "script"])
    def test_version(self, without_torch, start):
        assert without_torch(start, "--version").stdout == f"{lk.__version__}\n"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "required: COMMAND"),
            (["quantise"], "invalid choice: 'quantise' (choose from "),
            (["quantize", "model"], "required: output_dir"),
            (["plan", "model", "file"], "required: --budget"),
            (["quantize", "a", "b", "--format", "nf9"], "--format: invalid choice: 'nf9' (choose from "),
            (["quantize", "a", "b", "--group-size", "48"], "--group-size: invalid choice: 48"),
            (["quantize", "a", "b", "--init", "pissa"], "--init: invalid choice: 'pissa'"),
            (["quantize", "a", "b", "--scale-dtype", "float64"], "--scale-dtype: invalid choice: 'float64'"),
            (["quantize", "a", "b", "--rank", "-1"], "--rank: '-1' is no whole number of 0 or more"),
            (["quantize", "a", "b", "--rank", "1.5"], "--rank: '1.5' is no whole number"),
            (["quantize", "a", "b", "--num-iter", "0"], "--num-iter: '0' is no whole number in 1 .. "),
            (["quantize", "a", "b", "--lora-alpha", "-2"], "--lora-alpha: '-2' is no number above 0"),
            (["quantize", "a", "b", "--lora-alpha", "inf"], "--lora-alpha: 'inf' is no number above 0"),
            (["quantize", "a", "b", "--rank-energy", "2"], "--rank-energy: '2' is no number above 0 and at most 1"),
            (["quantize", "a", "b", "--outlier-channels", "-1"], "--outlier-channels: '-1' is no whole number"),
            (["quantize", "a", "b", "--seed", "x"], "--seed: 'x' is no whole number"),
            (["quantize", "a", "b", "--override", "*"], "--override: '*' is not PATTERN=FORMAT"),
            (["quantize", "a", "b", "--override", "=nf4"], "--override: '=nf4' is not PATTERN=FORMAT"),
            (["quantize", "a", "b", "--override", "*=nf9"], "--override: '*=nf9': unknown format 'nf9'; known: nf2, "),
            (["quantize", "a", "b", "--override", "*=nf4,colour=1"], "'colour=1' is not FIELD=VALUE with a FIELD of "),
            (["quantize", "a", "b", "--model-class", "helpers"], "--model-class: 'helpers' is not MODULE:CLASS"),
            (["plan", "a", "b", "--budget", "-3"], "--budget: '-3' is no number above 0"),
            (["plan", "a", "b", "--budget", "nan"], "--budget: 'nan' is no number above 0"),
            (
                ["plan", "a", "b", "--budget", "3", "--candidate", "nf5"],
                "--candidate: unknown format 'nf5'; known: nf2,",
            ),
            (["plan", "a", "b", "--budget", "3", "--candidate", "nf4,group_size=48"], "'48' is no group_size"),
            (["plan", "a", "b", "--budget", "3", "--candidate", "nf4,rank=x"], "'x' is no rank"),
            (["plan", "a", "b", "--budget", "3", "--candidate", "nf4,scale_dtype=int8"], "'int8' is no scale_dtype"),
            (["plan", "a", "b", "--budget", "3", "--candidate", "nf4,init=qlora"], "'init=qlora' is not FIELD=VALUE"),
            (["plan", "a", "b", "--budget", "3", "--count", "all"], "--count: invalid choice: 'all'"),
            (["serve", "a", "--adapter", "b"], "--adapter: 'b' is not NAME=FOLDER"),
            (["serve", "a", "--adapter", "=b"], "--adapter: '=b' is not NAME=FOLDER"),
            (["serve", "a", "--port", "65536"], "--port: '65536' is no whole number in 0 .. 65535"),
            (["demo", "--sentences", "0"], "--sentences: '0' is no whole number of 2 or more"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_usage(self, without_torch, arguments, message):
        done = without_torch("module", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(r"loftq-kernels: [^\n]+; see loftq-kernels( \w+)? --help\n", done.stderr), done.stderr
        assert message in done.stderr

    def test_bench_without_the_source_tree(self, without_torch, tmp_path):
        """The list of subjects is the benchmarks' own, which are no part of the package."""
        (tmp_path / "bench").mkdir()
        (tmp_path / "bench" / "__init__.py").touch()
        (tmp_path / "bench" / "__main__.py").write_text("import sys; print('subjects', *sys.argv[1:]); sys.exit(3)")
        for arguments, passed in [([], "--help"), (["--help"], "--help"), (["cpu", "--quick"], "cpu --quick")]:
            done = without_torch("module", "bench", *arguments)
            assert (done.returncode, done.stdout) == (3, f"subjects {passed}\n"), done.stderr


class TestImportInTheCommand:
    """In the process of the command torch comes late, and everything is there all the same; elsewhere it is at once."""

    def python(self, tmp_path, name: str, code: str, *command: str) -> str:
        """What the code prints as a file of this name, or as the command has it."""
        (tmp_path / name).write_text(code)
        environment = {"PYTHONPATH": f"{REPOSITORY}:{tmp_path}", "PATH": "/usr/bin:/bin"}
        command = [sys.executable, *(command or [str(tmp_path / name)])]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def test_names_come_when_they_are_asked_for(self, tmp_path):
        code = (
            "import _loftq_kernels_command\n"
            "_loftq_kernels_command.running = True\n"
            "import sys, loftq_kernels as lk\n"
            "assert 'torch' not in sys.modules and set(lk.__all__) <= set(dir(lk))\n"
            "try: lk.nothing\n"
            "except AttributeError as error: print(error)\n"
            "assert 'torch' not in sys.modules\n"
            "assert all(getattr(lk, name) is not None for name in lk.__all__)\n"
            "import torch; print(torch.ops.loftq_kernels.quantize)\n"
        )
        out = self.python(tmp_path, "program.py", code)
        assert out.startswith("module 'loftq_kernels' has no attribute 'nothing'") and "loftq_kernels.quantize" in out

    def test_ops_are_registered_elsewhere(self, tmp_path):
        """Also where torch is imported later, as import sorters have it."""
        code = "import loftq_kernels\nimport torch\nprint(torch.ops.loftq_kernels.quantize)\n"
        assert "loftq_kernels.quantize" in self.python(tmp_path, "program.py", code)

    @pytest.mark.parametrize("command", [[], ["-m", "other", "-m", "loftq_kernels"]], ids=["script", "module"])
    def test_others_that_look_like_the_command(self, tmp_path, command):
        """A script of the program's name, and a module that is given the words that start ours."""
        name = "other.py" if command else "loftq-kernels"
        code = "import loftq_kernels, sys, torch\nprint(torch.ops.loftq_kernels.quantize)\n"
        assert "loftq_kernels.quantize" in self.python(tmp_path, name, code, *command)

    def test_modules_of_other_packages(self, tmp_path):
        """While Python looks for ``-m other.module``, the package other imports ours."""
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "__init__.py").write_text("import loftq_kernels, sys; assert 'torch' in sys.modules")
        code = "import torch; print(torch.ops.loftq_kernels.quantize)"
        out = self.python(tmp_path, "other/module.py", code, "-m", "other.module", "-m", "loftq_kernels")
        assert "loftq_kernels.quantize" in out

    def test_public_names(self):
        from loftq_kernels import public

        assert all(getattr(public, name) is getattr(lk, name) for name in lk.__all__)
        own = {name for name, value in vars(public).items() if not name.startswith("_")}
        assert own == set(lk.__all__)


class TestFlags:
    """What the Python API calls an argument, in the words of the command line."""

    @pytest.mark.parametrize(
        ("message", "expected"),
        [
            ("init='eora' of layer 'a' needs statistics=: x", "--init eora of layer 'a' needs --calibration FILE: x"),
            ("budget=2 bits per weight is below 2.4", "--budget 2 bits per weight is below 2.4"),
            ("use scale_dtype=torch.float32", "use --scale-dtype float32"),
            ("include: the pattern 'x' matches nothing", "--include: the pattern 'x' matches nothing"),
            ("include=('*', 'a.b'), exclude=()", "--include * --include a.b, no --exclude"),
            ("layer_types=('linear',) leaves out 'conv'", "--layer-type linear leaves out 'conv'"),
            ("which quantize_head=True quantizes", "which --quantize-head quantizes"),
            ("candidate 'nf4 rank=64' of another model's", "candidate 'nf4 rank=64' of another model's"),
            ("another model's rank=9 and rank=None", "another model's --rank 9 and no --rank"),
            ("name the layers (layers=)", "name the layers (--include PATTERN)"),
            ("give a model (model=)", "give a model (--model-class MODULE:CLASS)"),
            ("count='total' and relative=False", "--count total and no --absolute"),
            ("a_rank=3, cfg.rank=3, ranks=3 are others", "a_rank=3, cfg.rank=3, ranks=3 are others"),
        ],
        ids=str,
    )
    def test_spelled(self, message, expected):
        assert flags.spelled(message, commands()["plan"].spelled) == expected

    def test_a_command_without_options(self):
        assert flags.spelled("rank=3", commands()["info"].spelled) == "rank=3"


def test_overrides():
    """Patterns may hold "=" themselves: the last part that begins with a format is what the layers get."""
    for text, expected in [
        ("*=nf4", ("*", {"format": "nf4"})),
        ("re:(?=x).*=int4,rank=8", ("re:(?=x).*", {"format": "int4", "rank": 8})),
        ("a=dense", ("a", "dense")),
        ("*.up=nf2,rank=0,init=qlora", ("*.up", {"format": "nf2", "rank": None, "init": "qlora"})),
    ]:
        assert values.override(text) == expected
    args = make_parser().parse_args(
        ["quantize", "a", "b", "--override", "x=nf2,scale_dtype=bfloat16", "--override", "y=dense"]
    )
    expected = {"x": {"format": "nf2", "scale_dtype": torch.bfloat16}, "y": None}
    assert options.config(args).overrides == expected
