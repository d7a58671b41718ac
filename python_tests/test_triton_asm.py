"""The PTX that decodes, evaluated instruction by instruction over every byte: no GPU and no Triton needed."""

from __future__ import annotations

import interpreter
import numpy as np
import ptx
import pytest
import torch
from torch import Tensor

import loftq_kernels as lk
from loftq_kernels.formats import get_format
from loftq_kernels.triton_kernels.codebooks import affine_map, codebook_values, make_decoder, two_roundings

HALVES = (torch.float16, torch.bfloat16)
# Every byte in every position, with other bytes around it: [words, 4], and the words.
BYTES = np.array(
    [[byte * factor + shift & 0xFF for factor in (1, 3, 5, 7)] for byte in range(256) for shift in (0, 91)],
    dtype=np.uint8,
)
WORDS = BYTES.view(np.uint32)[:, 0]


def run(setup: str, asm: str, outputs: int, words: np.ndarray, dtype: torch.dtype) -> Tensor:
    """What asm yields for registers of packed bytes, dtype.itemsize of them per field: float64 [fields, words, 4]."""
    registers: ptx.Registers = {}
    ptx.run(setup, [np.zeros(1, dtype=np.uint32)], 1, registers)
    results = [np.broadcast_to(result, words.shape) for result in ptx.run(asm, [words], outputs, registers)]
    fields = [np.stack(results[i : i + dtype.itemsize], 1) for i in range(0, outputs, dtype.itemsize)]
    return torch.stack([torch.from_numpy(field.view(np.uint8)).view(dtype).double() for field in fields])


def decoded(decoder, dtype: torch.dtype) -> Tensor:
    return run(decoder.setup, decoder.asm, 2 * decoder.planes * 8 // decoder.bits, WORDS, dtype)


def codes(bits: int) -> Tensor:
    """[fields, words, 4]"""
    return torch.stack(
        [torch.from_numpy(BYTES.astype(np.int64)) >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("sums", [False, True], ids=["", "sums"])
@pytest.mark.parametrize("format", lk.format_names())
def test_every_code(format, dtype, sums):
    """decoded + constant, times unit after center: the code book's entry, rounded to dtype where it is a table's."""
    values = tuple(get_format(format).codebook().tolist())
    decoder = make_decoder(values, dtype, sums=sums)
    fields = decoded(decoder, dtype)
    if decoder.constants:
        fields += torch.tensor(decoder.constants, dtype=torch.float64)[:, None, None]
    got = decoder.unit * (fields.unflatten(0, (-1, decoder.planes)).sum(1) + decoder.center)
    if decoder.table:
        unit, *tables = two_roundings(values, dtype)
        assert torch.equal(got, unit * looked_up(tables, codes(decoder.bits)))
    else:
        entries = torch.tensor(values, dtype=torch.float64)[codes(decoder.bits)]
        torch.testing.assert_close(got, entries, rtol=2e-7, atol=2e-7)


def looked_up(tables: list[Tensor], codes: Tensor) -> Tensor:
    """Entries of the first table for the first two bytes of a word, of the second for the others."""
    near, other = (table.double()[codes] for table in tables)
    return torch.cat([near[..., :2], other[..., 2:]], -1)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("format", [name for name in lk.format_names() if get_format(name).bits < 8])
def test_exact_tables(format, dtype):
    """exact=True: any code book of 4 or 16 entries comes out entry by entry, in its unit, without constants."""
    values = tuple(get_format(format).codebook().tolist())
    decoder = make_decoder(values, dtype, exact=True)
    unit, *tables = two_roundings(values, dtype)
    assert (decoder.constants, decoder.unit, decoder.center, decoder.planes) == ((), unit, 0.0, 1)
    assert torch.equal(decoded(decoder, dtype), looked_up(tables, codes(decoder.bits)))


@pytest.mark.parametrize("format", [name for name in lk.format_names() if get_format(name).bits < 8])
def test_float32_tables(format):
    """exact=True: the code book's entries, bit for bit."""
    codebook = get_format(format).codebook()
    decoder = make_decoder(tuple(codebook.tolist()), torch.float32, exact=True)
    fields = run(decoder.setup, decoder.asm, 4 * 8 // decoder.bits, WORDS, torch.float32)
    assert torch.equal(fields, codebook.double()[codes(decoder.bits)])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("format", ["nf4", "nf2", "uniform4", "int4"])
def test_two_roundings(format, dtype):
    """Errors of the mean of both tables, next to those of rounding once; the tables lie around the values."""
    values = torch.tensor(tuple(get_format(format).codebook().tolist()), dtype=torch.float64)
    unit, near, other = two_roundings(tuple(values.tolist()), dtype)
    mean = unit * (near.double() + other.double()) / 2
    once = (values.to(dtype).double() - values).square().mean()
    assert (mean - values).square().mean() <= once / 4
    assert ((unit * near.double() - values) * (unit * other.double() - values) <= 0).logical_or(near == other).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("format", lk.format_names())
def test_constants(format, dtype):
    """A line for each constant and one for 1.0 yield them whatever the bytes are; all are exact in dtype."""
    decoder = make_decoder(tuple(get_format(format).codebook().tolist()), dtype)
    lines = decoder.constant_asm.split("\n")
    if not decoder.asm:
        assert lines == [""]
        return
    assert len(lines) == len(decoder.constants) + 1
    for line, value in zip(lines, [*decoder.constants, 1.0], strict=True):
        assert (run(decoder.setup, line, 2, WORDS, dtype) == value).all()


def test_evaluator():
    """Instructions by examples in which every bit tells, and what is refused."""
    a, b = np.uint32(0x33221180), np.uint32(0x77665544)
    assert ptx.prmt(a, b, np.uint32(0x7531)) == 0x77553311
    assert ptx.prmt(a, b, np.array([0x3120, 0x9840], dtype=np.uint32)).tolist() == [0x33112280, 0x00FF4480]
    assert ptx.lop3(a, b, np.uint32(0xF00F), np.uint32(0xEA)) == a & b | 0xF00F
    assert ptx.lop3(a, b, np.uint32(0xF00F), np.uint32(0xAE)) == ~a & b | 0xF00F
    refused = {
        "mul.lo.u32 $0, $1, $1;": "no such instruction",
        "xor.b32 $0, $1;": "no such instruction",
        ".reg .b64 w; mov.b32 $0, $1;": "no such declaration",
        ".reg .b32 w; .reg .b32 w; mov.b32 $0, $1;": "w is declared twice",
        "mov.b32 $0, w;": "no register w",
        "mov.b32 w, $1; mov.b32 $0, w;": "no register w",
        "{ .reg .b32 w; mov.b32 w, $1; } mov.b32 $0, w;": "no register w",
        ".reg .b32 w; mov.b32 $0, w;": "w is read before it is written",
        "mov.b32 $1, $1; mov.b32 $0, $1;": r"no register \$1",
        ".reg .b32 w; mov.b32 w, $1;": r"\$0 is missing",
        "{ mov.b32 $0, $1;": "a brace is missing",
    }
    for text, message in refused.items():
        with pytest.raises(ValueError, match=message):
            ptx.run(text, [a], 1, {})


def test_inline_asm():
    """As the interpreter packs elements: 16-bit outputs in two registers of neighbours, 32-bit ones in four."""
    pairs = "".join(f"prmt.b32 ${i}, $6, 0, {selector:#x}; " for i, selector in enumerate((0x4140, 0x4342)))
    singles = "".join(f"prmt.b32 ${2 + i}, $6, zero, {0x4440 + i:#x}; " for i in range(4))
    setup = ".reg .b32 zero; mov.b32 zero, $1; mov.b32 $0, $1;"
    kinds, registers = [np.dtype(np.uint16), np.dtype(np.float32)], {}
    interpreter.inline_asm(setup, "=r,r", [np.zeros((), np.int32)], [np.dtype(np.int32)], 1, registers)
    values = BYTES.reshape(16, 128)
    short, single = interpreter.inline_asm(pairs + singles, "=r,=r,=r,=r,=r,=r,r", [values], kinds, 4, registers)
    assert np.array_equal(short, values) and np.array_equal(single.view(np.uint32), values)
    for constraints, rows in (("=r,r", values), ("=r,=r,=r,=r,=r,=r,r", values[:, :6])):
        with pytest.raises(ValueError, match="constraints|rows of 6"):
            interpreter.inline_asm(pairs + singles, constraints, [rows], kinds, 4, registers)


def test_affine_map():
    assert affine_map(tuple(get_format("int8").codebook().tolist())) == (-128.0, 1.0)
    assert affine_map(tuple(get_format("uniform4").codebook().tolist())) == pytest.approx((-1.0, 2 / 15))
    assert affine_map(tuple(get_format("nf4").codebook().tolist())) is None


def test_plain_triton_elsewhere():
    """No PTX for float32, where asked not to, and for tables of 256 entries."""
    nf4 = tuple(get_format("nf4").codebook().tolist())
    table = tuple(torch.linspace(-1, 1, 256).pow(3).tolist())
    for decoder in (
        make_decoder(nf4, torch.float32),
        make_decoder(nf4, torch.float16, asm=False),
        make_decoder(table, torch.float16),
    ):
        assert decoder.table and decoder.asm == decoder.setup == decoder.constant_asm == ""


def test_odd_code_books_are_refused():
    with pytest.raises(ValueError, match="not 8"):
        make_decoder((0.0,) * 8, torch.float16)


def test_values_are_remembered_by_tensor():
    """An edit in place is seen, and so is another tensor in the same memory."""
    codebook = torch.arange(4.0)
    assert codebook_values(codebook) is codebook_values(codebook) == (0.0, 1.0, 2.0, 3.0)
    codebook[0] = 9
    assert codebook_values(codebook)[0] == 9
    assert codebook_values(codebook.view(4).clone().fill_(5)) == (5.0,) * 4
