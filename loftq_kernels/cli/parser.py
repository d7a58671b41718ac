"""The parser of the command line: every argument with its meaning and its default. It is made without torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

import loftq_kernels
from loftq_kernels import vocabulary
from loftq_kernels.cli import values

PROGRAM = "loftq-kernels"


class _Help(argparse.RawDescriptionHelpFormatter):
    """Adds the default of each option to its help. Where that is None, the help has to say what it stands for."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, argparse.SUPPRESS) or not action.option_strings:
            return action.help
        return f"{action.help} (default: {'no' if action.default is False else '%(default)s'})"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and which knows by what names the Python API calls its options.

    ``spelled`` maps those names to options, for messages (`flags.spelled`).
    """

    def __init__(self, **options: Any):
        super().__init__(formatter_class=_Help, **options)
        self.spelled: dict[str, argparse.Action] = {}

    def option(self, *flags: str, group: Any = None, python: tuple[str, ...] = (), **options: Any) -> None:
        action = (group or self).add_argument(*flags, **options)
        self.spelled |= dict.fromkeys((action.dest, *python), action)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: {message}; see {self.prog} --help\n")


def make_parser() -> Parser:
    parser = Parser(prog=PROGRAM, description=loftq_kernels.__doc__, epilog=f"{PROGRAM} COMMAND --help says more.")
    parser.add_argument("--version", action="version", version=loftq_kernels.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for add in (_add_demo, _add_quantize, _add_plan, _add_inspect, _add_check, _add_bench, _add_info):
        add(commands)
    return parser


def _command(commands, name: str, summary: str, description: str, example: str) -> Parser:
    command = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.\n{description}".rstrip(),
        epilog=f"example:\n  {PROGRAM} {example}",
    )
    command.set_defaults(parser=command)
    return command


def _add_demo(commands) -> None:
    demo = _command(
        commands,
        "demo",
        "quantize a real sentence model to 2 and 4 bits and show what that did to it",
        "Takes one to three minutes; needs pip install 'loftq_kernels[demo]'.",
        "demo --output my-demo --sentences 100",
    )
    demo.option("--output", type=Path, default=Path("demo-output"), help="folder for table, plot and model")
    demo.option("--sentences", type=values.whole_number(2), default=400, help="how many sentences to compare")
    _add_overwrite(demo, "the folder of an earlier demo")


def _add_quantize(commands) -> None:
    quantize = _command(
        commands,
        "quantize",
        "quantize a local transformers or safetensors folder",
        "Writes a folder that lk.load_quantized reads, with the tokenizer and configs of the model beside it.",
        "quantize MODEL_DIR OUT_DIR --format nf2 --rank 64 --override '*.layer.[01].*=nf4'",
    )
    _add_model_dir(quantize)
    quantize.option("output_dir", type=Path, help="folder to write; it must be empty, or not exist yet")
    _add_overwrite(quantize, "an earlier checkpoint in OUTPUT_DIR")
    quantize.option(
        "--plan", type=Path, metavar="FILE", help=f"formats by layer, from {PROGRAM} plan (default: as --format says)"
    )
    _add_config(quantize)


def _add_plan(commands) -> None:
    plan = _command(
        commands,
        "plan",
        "choose each layer's format for a budget of bits, into a JSON file",
        "Quantizes every layer under every candidate, and solves for the least total error within the budget.",
        "plan MODEL_DIR plan.json --budget 2.5 --candidate nf2 --candidate nf4,group_size=32",
    )
    _add_model_dir(plan)
    plan.option("plan_file", type=Path, help="JSON file to write, which quantize takes as --plan")
    _add_overwrite(plan, "an earlier plan in PLAN_FILE")
    plan.option(
        "--budget",
        type=values.number(above=0),
        required=True,
        metavar="BITS",
        help="bits per weight on average over all planned layers, e.g. 2.5",
    )
    plan.option(
        "--candidate",
        action="append",
        type=values.candidate,
        python=("candidates",),
        metavar="FORMAT[,FIELD=VALUE...]",
        help='what layers may get, e.g. "nf2" or "nf4,group_size=32,rank=8" (repeatable; default: '
        f"{' '.join(vocabulary.DEFAULT_CANDIDATES)})",
    )
    plan.option(
        "--count",
        choices=tuple(vocabulary.COUNTS),
        help=f"what counts: {_meanings(vocabulary.COUNTS)} (default: packed)",
    )
    plan.option(
        "--absolute", action="store_true", python=("relative",), help="add up absolute errors instead of relative ones"
    )
    plan.option(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help="solve this plan again for the budget, measure nothing (default: measure MODEL_DIR)",
    )
    _add_config(plan)


def _add_inspect(commands) -> None:
    inspect = _command(
        commands,
        "inspect",
        "describe a quantized folder: bits per weight, sizes and, against the dense model, errors",
        "",
        "inspect OUT_DIR --against MODEL_DIR",
    )
    inspect.option("model_dir", type=Path, help="folder that quantize or lk.save_quantized has written")
    inspect.option(
        "--against",
        type=Path,
        metavar="DENSE_DIR",
        help="folder of the dense model, to measure each layer's error (default: errors are not shown)",
    )
    _add_model_class(inspect)


def _add_check(commands) -> None:
    _command(
        commands,
        "check",
        "try every kernel of this machine against the reference",
        "Prints a row per kernel; ends with status 1 if one fails. What is not on this machine is no failure.",
        "check",
    )


def _add_bench(commands) -> None:
    bench = _command(
        commands,
        "bench",
        "run the benchmarks of the source tree (python -m bench)",
        "Without arguments it lists the subjects. All arguments go to python -m bench.",
        "bench cpu --quick",
    )
    bench.add_argument("arguments", nargs="*", metavar="ARGUMENT", help="subjects and options of python -m bench")


def _add_info(commands) -> None:
    _command(commands, "info", "versions, devices and kernels of this installation", "", "info")


def _add_model_dir(parser: Parser) -> None:
    parser.option("model_dir", type=Path, help="folder of a dense model: transformers, or plain safetensors")


def _add_overwrite(parser: Parser, what: str) -> None:
    parser.option("--overwrite", action="store_true", help=f"replace {what}; files of others are never replaced")


def _add_config(parser: Parser) -> None:
    """The fields of `QuantConfig`."""
    _add_weight(parser, parser.add_argument_group("the weights"))
    _add_adapter(parser, parser.add_argument_group("the adapter"))
    _add_start(parser, parser.add_argument_group("how both are chosen"))
    _add_layers(parser, parser.add_argument_group("which layers"))


def _add_weight(parser: Parser, group) -> None:
    parser.option("--format", group=group, default="nf4", choices=tuple(vocabulary.FORMATS), help=_formats())
    parser.option(
        "--group-size",
        group=group,
        type=int,
        default=64,
        choices=vocabulary.GROUP_SIZES,
        help="columns of a weight that share a scale; -1: the whole row",
    )
    parser.option(
        "--scale-dtype",
        group=group,
        default="float16",
        choices=vocabulary.SCALE_DTYPES,
        help="of the scales: bfloat16 and float32 hold larger and smaller ones",
    )
    parser.option(
        "--scale-search", group=group, action="store_true", help="search each group's scale of least error, slower"
    )


def _add_adapter(parser: Parser, group) -> None:
    parser.option("--rank", group=group, type=values.whole_number(0), default=16, help="of the adapter; 0 for none")
    parser.option(
        "--lora-alpha", group=group, type=values.number(above=0), help="scaling = alpha / rank (default: scaling 1)"
    )
    parser.option("--use-rslora", group=group, action="store_true", help="scaling = alpha / sqrt(rank)")
    adapters = _meanings(vocabulary.ADAPTERS)
    parser.option("--adapter", group=group, default="lora", choices=tuple(vocabulary.ADAPTERS), help=adapters)
    parser.option(
        "--adapter-dtype",
        group=group,
        choices=vocabulary.DTYPES,
        help="of lora_A and lora_B (default: the model's, but float32 for float16 and bfloat16 models)",
    )


def _add_start(parser: Parser, group) -> None:
    initializers = _meanings(vocabulary.INITIALIZERS)
    parser.option("--init", group=group, default="loftq", choices=tuple(vocabulary.INITIALIZERS), help=initializers)
    parser.option(
        "--calibration",
        group=group,
        type=Path,
        python=("statistics",),
        metavar="FILE",
        help="statistics of the layers' inputs, from lk.collect_activations (default: none, weights alone count)",
    )
    parser.option(
        "--rank-energy",
        group=group,
        type=values.number(above=0, most=1),
        metavar="SHARE",
        help="aser: least rank that keeps this share of the singular values (default: --rank for each layer)",
    )
    parser.option(
        "--outlier-channels",
        group=group,
        type=values.whole_number(0),
        default=32,
        help="aser: columns left to the adapter",
    )
    parser.option(
        "--num-iter", group=group, type=values.whole_number(1, 2**31 - 1), default=5, help="alternations of loftq"
    )
    seed = values.whole_number(-(2**63), 2**64 - 1)
    parser.option("--seed", group=group, type=seed, default=0, help="of everything random")
    parser.option("--device", group=group, help="where to compute, e.g. cuda (default: where the model is, the CPU)")


def _add_layers(parser: Parser, group) -> None:
    parser.option(
        "--include",
        group=group,
        action="append",
        python=("layers",),
        metavar="PATTERN",
        help="layer names to quantize: globs of whole names, or re:REGULAR_EXPRESSION (repeatable; default: all)",
    )
    parser.option(
        "--exclude",
        group=group,
        action="append",
        metavar="PATTERN",
        help="layer names to leave dense (repeatable; default: none)",
    )
    parser.option(
        "--override",
        group=group,
        action="append",
        type=values.override,
        python=("overrides",),
        metavar="PATTERN=FORMAT[,FIELD=VALUE...]",
        help='what some layers get instead, e.g. "*.layer.[01].*=nf4" or "*.up=int4,rank=8"; FORMAT "dense" leaves '
        "them (repeatable, the first match wins; default: none)",
    )
    parser.option(
        "--layer-type",
        group=group,
        action="append",
        choices=vocabulary.LAYER_TYPES,
        python=("layer_types",),
        help="kinds of layers to quantize (repeatable; default: linear)",
    )
    parser.option(
        "--modules-to-save",
        group=group,
        action="append",
        metavar="NAME",
        help="modules that stay dense and are trained in full, such as a fresh classifier (repeatable; default: none)",
    )
    parser.option(
        "--quantize-head", group=group, action="store_true", help="also the output head, which stays dense else"
    )
    _add_model_class(parser, group)


def _add_model_class(parser: Parser, group=None) -> None:
    parser.option(
        "--model-class",
        group=group,
        type=values.model_class,
        python=("model",),
        metavar="MODULE:CLASS",
        help="of a folder without config.json: the model that its tensors belong to, made without arguments "
        "(default: the layers that are named, and nothing around them)",
    )


def _formats() -> str:
    """The formats with what each group of them stores."""
    names: dict[str, list[str]] = {}
    for name, word in vocabulary.FORMATS.items():
        names.setdefault(vocabulary.FORMAT_MEANINGS[word.family, word.scale_rule], []).append(name)
    return "; ".join(f"{', '.join(own)}: {meaning}" for meaning, own in names.items())


def _meanings(words: dict[str, str]) -> str:
    return "; ".join(f"{word}: {meaning}" for word, meaning in words.items())
