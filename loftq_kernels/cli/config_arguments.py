"""The fields of `QuantConfig` as arguments of the command line, and the class of a model that has no config.json."""

from __future__ import annotations

from pathlib import Path

from loftq_kernels import vocabulary
from loftq_kernels.cli import values
from loftq_kernels.cli.base_parser import Parser


def add_config(parser: Parser) -> None:
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
    adapters = meanings(vocabulary.ADAPTERS)
    parser.option("--adapter", group=group, default="lora", choices=tuple(vocabulary.ADAPTERS), help=adapters)
    parser.option(
        "--adapter-dtype",
        group=group,
        choices=vocabulary.DTYPES,
        help="of lora_A and lora_B (default: the model's, but float32 for float16 and bfloat16 models)",
    )


def _add_start(parser: Parser, group) -> None:
    initializers = meanings(vocabulary.INITIALIZERS)
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
    add_model_class(parser, group)


def add_model_class(parser: Parser, group=None) -> None:
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


def meanings(words: dict[str, str]) -> str:
    return "; ".join(f"{word}: {meaning}" for word, meaning in words.items())
