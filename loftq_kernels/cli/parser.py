"""The parser of the command line: every command with its arguments, made without torch."""

from __future__ import annotations

from pathlib import Path

import loftq_kernels
from loftq_kernels import vocabulary
from loftq_kernels.cli import values
from loftq_kernels.cli.base_parser import PROGRAM, Parser
from loftq_kernels.cli.config_arguments import add_config, add_model_class, meanings


def make_parser() -> Parser:
    parser = Parser(prog=PROGRAM, description=loftq_kernels.__doc__, epilog=f"{PROGRAM} COMMAND --help says more.")
    parser.add_argument("--version", action="version", version=loftq_kernels.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for add in (_add_demo, _add_quantize, _add_plan, _add_inspect, _add_serve, _add_check, _add_bench, _add_info):
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
    add_config(quantize)


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
        help=f"what counts: {meanings(vocabulary.COUNTS)} (default: packed)",
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
    add_config(plan)


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
    add_model_class(inspect)


def _add_serve(commands) -> None:
    serve = _command(
        commands,
        "serve",
        "serve a quantized folder and adapters of it by transformers' OpenAI-compatible server",
        "Requests choose by model name: the folder, or its last part, for the model alone, NAME for an adapter.\n"
        "Needs pip install 'loftq_kernels[serve]'. There is no password: whoever reaches the port may ask.",
        "serve OUT_DIR --adapter fables=ADAPTER_DIR --port 8000",
    )
    serve.option("model_dir", type=Path, help="folder of a quantized transformers model, as quantize writes it")
    serve.option(
        "--adapter",
        action="append",
        type=values.named_folder,
        metavar="NAME=FOLDER",
        help="an adapter of the model, in PEFT's files, and the model name that chooses it (repeatable; default: none)",
    )
    serve.option("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 is every network of this machine")
    serve.option("--port", type=values.whole_number(0, 65535), default=8000, help="port to listen at; 0 for a free one")
    serve.option("--device", help="where to compute, e.g. cpu (default: a GPU that torch can use, or else the CPU)")


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
