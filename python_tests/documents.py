"""The code blocks of the documents, found by what they are, and run as their readers would run them."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
COMMANDS = (
    "pip",
    "make",
    "loftq-kernels",
    "python",
    "cmake",
    "curl",
    "git",
)  # what an indented block of shell lines starts with


@dataclass(frozen=True)
class Block:
    document: str
    section: str  # the last heading of the first or second level before it
    language: str  # "python", "sh" or any other; "text" for indented lines that are no commands
    text: str
    line: int

    @property
    def first(self) -> str:
        return next((line.strip() for line in self.text.splitlines() if line.strip()), "")

    def __str__(self) -> str:
        return f"{self.document}:{self.line} ({self.language}): {self.first}"


def blocks_of(document: str) -> list[Block]:
    """Fenced and indented blocks, in order."""
    found, section = [], ""
    lines = (REPOSITORY / document).read_text(encoding="utf-8").splitlines()
    at = 0
    while at < len(lines):
        line, start = lines[at], at
        at += 1
        if line.startswith(("# ", "## ")):
            section = line.lstrip("# ")
        elif line.startswith("```"):
            while not lines[at].startswith("```"):
                at += 1
            found.append(Block(document, section, line[3:].strip(), "\n".join(lines[start + 1 : at]) + "\n", start + 1))
            at += 1
        elif line.startswith("    ") and (start == 0 or not lines[start - 1].strip()):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            text = "\n".join(item[4:] for item in lines[start:at]).rstrip() + "\n"
            found.append(Block(document, section, "sh" if _is_shell(text) else "text", text, start + 1))
    return found


def _is_shell(text: str) -> bool:
    words = [line.split()[0] for line in text.splitlines() if line.strip() and not line.startswith(" ")]
    return all(word in COMMANDS for word in words)


def run_python(block: Block, names: dict[str, Any], presupposed: Mapping[str, Callable[[], Any]]) -> None:
    """Run a block. names: what earlier blocks of its section have bound, to which it adds.

    Any other name that it reads comes from presupposed, made anew for each block.
    """
    tree = ast.parse(block.text)
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    given = {name: presupposed[name]() for name in sorted(read - names.keys()) if name in presupposed}
    scope = {**given, **names}
    exec(compile("\n" * block.line + block.text, str(REPOSITORY / block.document), "exec"), scope)
    names.update({name: value for name, value in scope.items() if name not in given or value is not given[name]})


def commands_of(block: Block) -> list[list[str]]:
    """The commands of a shell block as lists of words, without comments."""
    lines = re.sub(r"\\\n", " ", block.text).splitlines()
    return [words for line in lines if (words := shlex.split(line.removeprefix("$ "), comments=True))]
