"""The words that users choose from, each with what it means: stated here, and nowhere else.

Imports nothing of the package and no torch: the command line shows and checks them before either is loaded.
"""

from __future__ import annotations

from typing import NamedTuple


class FormatWord(NamedTuple):
    """What a format is, as `formats.Format` has it."""

    bits: int
    family: str
    scale_rule: str


FORMATS = {
    "nf2": FormatWord(2, "normal_float", "absmax"),
    "nf4": FormatWord(4, "normal_float", "absmax"),
    "int2": FormatWord(2, "integers", "minmax"),
    "int4": FormatWord(4, "integers", "minmax"),
    "int8": FormatWord(8, "integers", "minmax"),
    # Symmetric integers: absmax / (2^(b-1) - 1), no offset.
    "int2_sym": FormatWord(2, "integers", "absmax"),
    "int4_sym": FormatWord(4, "integers", "absmax"),
    "int8_sym": FormatWord(8, "integers", "absmax"),
    "uniform2": FormatWord(2, "uniform", "mean_std"),
    "uniform4": FormatWord(4, "uniform", "mean_std"),
}
FORMAT_MEANINGS = {  # (family, scale rule) -> what its formats store
    ("normal_float", "absmax"): "quantiles of a normal distribution",
    ("integers", "minmax"): "integers with an offset for each group",
    ("integers", "absmax"): "integers around 0",
    ("uniform", "mean_std"): 'evenly spaced levels, LoftQ\'s "uniform"',
}
GROUP_SIZES = (32, 64, 128, 256, -1)  # -1: the whole row
SCALE_DTYPES = ("float16", "bfloat16", "float32")
DTYPES = (*SCALE_DTYPES, "float64")
INITIALIZERS = {
    "loftq": "codes and adapter in turns, each on what the other leaves",
    "qlora": "nearest codes, an adapter that starts at 0",
    "eora": "nearest codes, the adapter of least output error (needs calibration)",
    "aser": "as eora, after leaving outlier channels to the adapter (needs calibration)",
}
ADAPTERS = {"lora": "of the input, as in PEFT", "qalora": "of group means, which merges into the weight exactly"}
LAYER_TYPES = ("linear", "conv", "embedding")
COUNTS = {
    "codes": "the codes alone",
    "packed": "codes, scales, offsets and code book",
    "total": "the adapters, too",
}
CANDIDATE_FIELDS = ("format", "group_size", "rank", "scale_dtype", "scale_search")
DEFAULT_CANDIDATES = ("nf2", "nf4", "int8")
