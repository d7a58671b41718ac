"""What a kernel is compiled for instead of a code book's tensor: a `Decoder`, made once per code book and dtype.

The instructions are PTX text, as `tl.inline_asm_elementwise` takes it with ``pack=4``. One 32-bit register holds four
consecutive packed bytes. Each of their fields comes out in the bytes' order, as two registers of two 16-bit floats or
as four registers of float32.
"""

from __future__ import annotations

import math
import weakref
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .contract import code_bits

MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}
EXPONENT_BIAS = {torch.bfloat16: 127, torch.float16: 15}
# Selectors of prmt. Of bytes l0 l1 l2 l3 and h0 h1 h2 h3 they take the pairs (h0 l0, h2 l2) and (h1 l1, h3 l3), or
# (h1 l1 h0 l0) and (h3 l3 h2 l2); of words a and b the two low halves, b's above a's, or the two high halves.
PAIR_SELECTORS = (0x6240, 0x7351)
ZIP_SELECTORS = (0x5140, 0x7362)
HALF_SELECTORS = (0x5410, 0x7632)
LOP3_AND_OR = 0xEA  # (a & b) | c
LOP3_ANDN_OR = 0xAE  # (~a & b) | c


class Decoder(NamedTuple):
    """How codes become values: ``codebook[code] = unit * (value + center)``, with ``value = decoded + constant``.

    Kernels take it whole, as one constexpr argument: a tuple, which Triton can hash, print and store.

    ``asm`` yields planes * 8 / bits fields. Field f holds the columns of slice f // planes of a tile, and the fields of
    one slice add up. ``constants[f]`` has to be added to field f: kernels do so by one more product with x, of a
    constant matrix, which is exact. Where the PTX is empty plain Triton decodes, from the code book if `table` is set.
    """

    bits: int
    table: bool  # values are looked up (in the two tables of `two_roundings`); otherwise they are affine in the code
    setup: str  # PTX that declares what asm reads; it comes once per kernel, before any asm
    asm: str
    planes: int
    constants: tuple[float, ...]  # one per field, or () where all are zero
    constant_asm: str  # PTX that yields constants[f] in place of a field, one per line; the last line yields 1.0
    unit: float
    center: float


@lru_cache(maxsize=256)
def make_decoder(
    values: tuple[float, ...], dtype: torch.dtype, *, asm: bool = True, exact: bool = False, sums: bool = False
) -> Decoder:
    """The `Decoder` of a code book's `values`, 2^bits of them, for operands of `dtype`.

    With asm=False, or a dtype that is not of 16 bits, plain Triton decodes. With exact=True unit * ``decoded`` is the
    rounded entry (in float32 the entry itself) even where arithmetic would be cheaper, for kernels that want no
    corrections. With sums=True the kernel has sums of x at hand anyhow, so that one constant for all fields may be part
    of `center`.
    """
    bits = code_bits(len(values))
    if 1 << bits != len(values) or bits not in (2, 4, 8):
        raise ValueError(f"a code book has 4, 16 or 256 entries, not {len(values)}")
    asm = asm and (dtype in MANTISSA_BITS or (exact and dtype == torch.float32))
    affine = None if exact else affine_map(values)
    if affine is None:
        if not asm or bits == 8:
            return Decoder(bits, True, "", "", 1, (), "", 1.0, 0.0)
        if dtype == torch.float32:
            words, text = _table_asm(*2 * (torch.tensor(values, dtype=dtype),))
            return Decoder(bits, True, _setup(words), text, 1, (), "", 1.0, 0.0)
        unit, near, other = two_roundings(values, dtype)
        words, text = _table_asm(near, other)
        setup, constant_asm = _constants(words, (), dtype)
        return Decoder(bits, True, setup, text, 1, (), constant_asm, unit, 0.0)
    words, text, biases = _affine_asm(bits, dtype) if asm else ((), "", (0.0,) * (8 // bits))
    start, step = affine
    constants = tuple(start / step - bias for bias in biases)
    planes = len(biases) * bits // 8
    center = 0.0
    if planes > 1:  # The start belongs to the sum of the planes: the first plane carries it.
        constants = (constants[0], *(-bias for bias in biases[1:]))
    if sums and planes == 1 and len(set(biases)) == 1:
        constants, center = (), start / step - biases[0]
    elif not all(_is_exact(constant, dtype) for constant in constants):
        constants, center = tuple(-bias for bias in biases), start / step
    if not any(constants):
        constants = ()
    setup, constant_asm = _constants(words, constants, dtype) if text else ("", "")
    return Decoder(bits, False, setup, text, planes, constants, constant_asm, step, center)


@lru_cache(maxsize=256)
def two_roundings(values: tuple[float, ...], dtype: torch.dtype) -> tuple[float, Tensor, Tensor]:
    """(unit, near, other): values / unit rounded to dtype, and rounded to the other side where that brings the mean of
    the two closer.

    If NF4's entries are rounded to bfloat16 once, their errors have a sum over the codes of a weight that is far from
    zero: with x of one sign the product's error is 6 to 8 times that of rounded weights. So each table decodes half of
    the columns. The unit is one of 1024 between 1/2 and 1. It is chosen first for a small mean of all errors, which x
    of one sign adds up without end, and with less weight for small errors of the entries' means and of the entries.
    """
    exact = torch.tensor(values, dtype=torch.float64)
    units = 1024 / torch.arange(1024, 2048, dtype=torch.float64)[:, None]
    near, other = _rounded_twice(exact / units, dtype)
    errors = torch.stack([table.double() * units - exact for table in (near, other)])
    of_mean, of_each = errors.mean(0).square().mean(1).sqrt(), errors.square().mean((0, 2)).sqrt()
    score = 8 * errors.mean((0, 2)).abs() + of_mean + 0.3 * of_each
    best = int(score.nan_to_num(nan=math.inf).argmin())  # The score is NaN where an entry / unit overflows.
    return units[best].item(), near[best], other[best]


def _rounded_twice(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    near = values.to(dtype)
    other = torch.nextafter(near, torch.where(values > near.double(), math.inf, -math.inf).to(dtype))
    closer = ((near.double() + other.double()) / 2 - values).abs() < (near.double() - values).abs()
    return near, torch.where(closer, other, near)


def affine_map(values: tuple[float, ...]) -> tuple[float, float] | None:
    """(start, step) of values that are start + step * code up to float32's rounding, or None."""
    step = (values[-1] - values[0]) / (len(values) - 1)
    error = max(abs(value - (values[0] + step * code)) for code, value in enumerate(values))
    largest = max(abs(values[0]), abs(values[-1]))
    return (values[0], step) if step != 0 and error <= 2.0**-23 * largest else None


def _is_exact(value: float, dtype: torch.dtype) -> bool:
    return torch.tensor(value, dtype=torch.float64).to(dtype).double().item() == value


# ---- the values of a code book's tensor, read from its device once


class Entries(tuple):
    """The entries of a code book. Equal ones are one object, so that they hash and compare as fast as any object."""

    __slots__ = ()
    __hash__ = object.__hash__
    __eq__ = object.__eq__


_interned: dict[tuple[float, ...], Entries] = {}
_values: dict[int, tuple[weakref.ref, int, Entries]] = {}  # By id of the tensor. A dead reference removes its entry.


def known_values(codebook: Tensor) -> Entries | None:
    """The entries of codebook if `codebook_values` has read them from this very tensor and it has not changed since."""
    known = _values.get(id(codebook))
    if known is not None and known[0]() is codebook and known[1] == _version(codebook):
        return known[2]
    return None


def codebook_values(codebook: Tensor) -> Entries:
    """The entries of codebook. They are remembered by the tensor, not by its memory, which another tensor may be given.

    Raises RuntimeError where they are not known yet and the device cannot be waited for: in a CUDA graph's capture.
    """
    entries = known_values(codebook)
    if entries is not None:
        return entries
    if codebook.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured, and this weight's code book has not been read: call with the same tensors "
            "once before the capture"
        )
    values, key = tuple(codebook.tolist()), id(codebook)
    entries = _interned.setdefault(values, Entries(values))
    _values[key] = weakref.ref(codebook, lambda _: _values.pop(key, None)), _version(codebook), entries
    return entries


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # Tensors made in inference mode do not count versions.


# ---- PTX


def _setup(words: tuple[int, ...]) -> str:
    """PTX that puts words into registers loftq_w0, loftq_w1, ... for the whole function; input $1 must be zero.

    ptxas must not know that they are constants: it would copy them from uniform registers before every use, which takes
    1.2 instructions per weight for nf4. So they are made from an argument of the kernel and the thread's index.
    """
    declare = ".reg .b32 loftq_zero; mov.u32 loftq_zero, %tid.x; and.b32 loftq_zero, loftq_zero, $1;"
    lines = [f".reg .b32 loftq_w{i}; xor.b32 loftq_w{i}, loftq_zero, {word:#x};" for i, word in enumerate(words)]
    return "\n".join([declare, *lines, "mov.b32 $0, $1;"])


def _constants(words: tuple[int, ...], constants: tuple[float, ...], dtype: torch.dtype) -> tuple[str, str]:
    """The setup for words, constants and 1.0, and the PTX that yields constants and 1.0, one per line.

    The two registers are (packed & 0) | constant and (~packed & 0) | constant. An instruction takes four registers side
    by side, and ptxas would copy those that it knows to be equal together again for each instruction.
    """
    patterns = torch.tensor([*constants, 1.0], dtype=torch.float64).to(dtype).view(torch.int16).tolist()
    pairs = [(pattern & 0xFFFF) * 0x10001 for pattern in patterns]
    words = (*words, *sorted(set(pairs)))
    registers = [f"loftq_w{len(words) - len(set(pairs)) + sorted(set(pairs)).index(pair)}" for pair in pairs]
    lines = [
        f"lop3.b32 $0, $2, loftq_zero, {name}, {LOP3_AND_OR:#x}; "
        f"lop3.b32 $1, $2, loftq_zero, {name}, {LOP3_ANDN_OR:#x};"
        for name in registers
    ]
    return _setup(words), "\n".join(lines)


def _word(byte_values: list[int]) -> int:
    return sum(byte << 8 * i for i, byte in enumerate(byte_values))


_Planes = list[list[int]]  # A table by bytes: all entries' lowest bytes, then the next, up to the highest.


def _table_asm(near: Tensor, other: Tensor) -> tuple[tuple[int, ...], str]:
    """The first two of four bytes are looked up in near, the others in other: two tables of 16-bit or 32-bit floats."""
    tables = tuple(table.view(torch.uint8).view(len(table), table.element_size()).T.tolist() for table in (near, other))
    return _table4_asm(tables) if len(near) == 16 else _table2_asm(tables)


def _table4_asm(tables: tuple[_Planes, _Planes]) -> tuple[tuple[int, ...], str]:
    """PRMT looks 4 codes at a time up in the bytes of 8 entries, by the codes' low three bits; their high bits choose
    between the two halves of the table by a third PRMT. It takes 2.6 instructions per weight for floats of 16 bits and
    5.5 for floats of 32 bits."""
    count, source = len(tables[0]), f"${2 * len(tables[0])}"
    quarters = [[[_word(plane[i : i + 4]) for i in range(0, 16, 4)] for plane in planes] for planes in tables]
    words = tuple(dict.fromkeys((0x32103210, *(part[i] for planes in quarters for part in planes for i in (0, 2)))))
    register = {word: f"loftq_w{i}" for i, word in enumerate(words)}
    lines = [
        "{ .reg .b32 index, half, b0, b1, b2, b3, t, u;",
        f"and.b32 index, {source}, 0x77777777;",
        f"shr.u32 half, {source}, 1;",
        f"lop3.b32 half, half, 0x44444444, {register[0x32103210]}, {LOP3_AND_OR:#x};",
    ]
    for pair in (0, 1):
        if pair:
            lines += ["shr.u32 index, index, 16;", "shr.u32 half, half, 16;"]
        for plane, part in enumerate(quarters[pair]):
            lines += [
                f"prmt.b32 b{plane}, {register[part[0]]}, {part[1]:#x}, index;",
                f"prmt.b32 t, {register[part[2]]}, {part[3]:#x}, index;",
                f"prmt.b32 b{plane}, b{plane}, t, half;",
            ]
        lines += _assembled(count, pair, (0, 1))
    return words, "\n".join([*lines, "}"])


def _table2_asm(tables: tuple[_Planes, _Planes]) -> tuple[tuple[int, ...], str]:
    """Two fields at a time lie in nibbles, each of which selects one of a table's four entries. It takes 1.3
    instructions per weight for floats of 16 bits."""
    count, source = len(tables[0]), f"${4 * len(tables[0])}"
    columns = [[_word(plane) for plane in planes] for planes in tables]
    words = tuple(dict.fromkeys(word for planes in columns for word in planes))
    register = {word: f"loftq_w{i}" for i, word in enumerate(words)}
    lines = ["{ .reg .b32 index, b0, b1, b2, b3, t, u;"]
    for first in (0, 1):  # Fields first and first + 2 are looked up together.
        if first:
            lines += [f"shr.u32 index, {source}, 2;", "and.b32 index, index, 0x33333333;"]
        else:
            lines += [f"and.b32 index, {source}, 0x33333333;"]
        for pair in (0, 1):
            if pair:
                lines += ["shr.u32 index, index, 16;"]
            for plane, word in enumerate(columns[pair]):
                lines += [f"prmt.b32 b{plane}, {register[word]}, {register[word]}, index;"]
            lines += _assembled(count, pair, (first, first + 2))
    return words, "\n".join([*lines, "}"])


def _assembled(count: int, pair: int, fields: tuple[int, int]) -> list[str]:
    """The outputs of two bytes' codes from b0, b1, ...: register i of the `count` holds byte i of the entries, of the
    first byte's two fields and then of the second byte's."""
    if count == 2:
        return [
            f"prmt.b32 ${2 * field + pair}, b0, b1, {selector:#x};"
            for field, selector in zip(fields, PAIR_SELECTORS, strict=True)
        ]
    lines = []
    for byte, zipped in enumerate(ZIP_SELECTORS):
        lines += [f"prmt.b32 t, b0, b1, {zipped:#x};", f"prmt.b32 u, b2, b3, {zipped:#x};"]
        lines += [
            f"prmt.b32 ${4 * field + 2 * pair + byte}, t, u, {half:#x};"
            for field, half in zip(fields, HALF_SELECTORS, strict=True)
        ]
    return lines


def _affine_asm(bits: int, dtype: torch.dtype) -> tuple[tuple[int, ...], str, tuple[float, ...]]:
    """Codes become the low bits of the mantissa of a power of two: bias + code. Returns words, asm and the
    bias of each field."""
    mantissa, width = MANTISSA_BITS[dtype], bits
    fields = [(bits * i, 0) for i in range(8 // bits)]  # Each: its first bit in the byte, the power of two it counts.
    if bits > mantissa:  # int8 in bfloat16 has a plane for each nibble.
        width, fields = 4, [(0, 0), (4, 4)]
    # A field that fits into the mantissa where it lies needs no shift. The higher it lies the smaller is its bias, by
    # which float32 sums grow before they cancel. So float16 lifts all fields by the bits that it has above a byte.
    lift = max(mantissa - 8, 0)
    places = [position + lift if position + lift + width <= mantissa else 0 for position, _ in fields]
    exponents = [mantissa - place + power for place, (_, power) in zip(places, fields, strict=True)]
    magics = [(EXPONENT_BIAS[dtype] + exponent) << mantissa for exponent in exponents]
    words = sorted(set(magics))
    # The bytes of a pair of neighbours go to the two halves of the register: 0 2 1 3.
    lines = ["{ .reg .b32 w, t;", f"prmt.b32 w, ${2 * len(fields)}, ${2 * len(fields)}, 0x3120;"]
    for pair in (0, 1):
        for i, (place, (position, _)) in enumerate(zip(places, fields, strict=True)):
            shift = 8 * pair + position - place
            source = "t" if shift else "w"
            if shift:
                lines.append(f"shr.u32 t, w, {shift};" if shift > 0 else f"shl.b32 t, w, {-shift};")
            mask = ((1 << width) - 1) << place
            magic = f"loftq_w{words.index(magics[i])}"
            lines.append(f"lop3.b32 ${2 * i + pair}, {source}, {mask * 0x10001:#x}, {magic}, {LOP3_AND_OR:#x};")
    pairs = tuple(word * 0x10001 for word in words)
    return pairs, "\n".join([*lines, "}"]), tuple(2.0**exponent for exponent in exponents)
