"""The PTX that decodes, evaluated instruction by instruction over every byte: no GPU and no Triton needed."""

from __future__ import annotations

import re

import pytest
import torch

import loftq_kernels as lk
from loftq_kernels.formats import get_format
from loftq_kernels.triton_kernels.codebooks import affine_map, codebook_values, make_decoder, two_roundings

HALVES = (torch.float16, torch.bfloat16)
MASK = 0xFFFFFFFF


def prmt(a: int, b: int, selector: int) -> int:
    """Four bytes out of the eight of a and b; bit 3 of a selector's nibble replicates the byte's sign."""
    result = 0
    for i in range(4):
        nibble = selector >> 4 * i & 0xF
        byte = (b << 32 | a) >> 8 * (nibble & 7) & 0xFF
        if nibble & 8:
            byte = 0xFF if byte & 0x80 else 0
        result |= byte << 8 * i
    return result


def lop3(a: int, b: int, c: int, table: int) -> int:
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32))


OPERATIONS = {
    "mov.u32": lambda a: a,
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
}


def execute(text: str, registers: dict[str, int]) -> None:
    """Runs straight-line PTX; a register that is read must have been declared (or be an operand) and written."""
    declared = {name for name in registers} | {"%tid.x"}
    for statement in re.split(r"[;{}]", text):
        statement = statement.strip()
        if not statement:
            continue
        name, _, rest = statement.partition(" ")
        operands = [operand.strip() for operand in rest.split(",")]
        if name == ".reg":
            declared |= {operand.removeprefix(".b32 ") for operand in operands}
            continue
        target, *sources = operands
        assert target in declared or target.startswith("$"), statement
        values = [int(source, 0) if source[0].isdigit() else registers[source] for source in sources]
        registers[target] = OPERATIONS[name](*values) & MASK


def run(setup: str, asm: str, outputs: int, word: int) -> list[int]:
    """The 16-bit patterns that asm yields for one register of packed bytes: outputs registers, low half first."""
    registers = {"%tid.x": 21, "$1": 0}
    execute(setup, registers)
    state = {**{k: v for k, v in registers.items() if not k.startswith("$")}, f"${outputs}": word}
    execute(asm, state)
    return [state[f"${i}"] >> shift & 0xFFFF for i in range(outputs) for shift in (0, 16)]


def floats(patterns: list[int], dtype: torch.dtype) -> list[float]:
    signed = [pattern - (pattern >> 15 << 16) for pattern in patterns]
    return torch.tensor(signed, dtype=torch.int16).view(dtype).double().tolist()


def words() -> list[int]:
    """Every byte in every position, with other bytes around it."""
    return [
        sum((byte * factor + shift & 0xFF) << 8 * i for i, factor in enumerate((1, 3, 5, 7)))
        for byte in range(256)
        for shift in (0, 91)
    ]


def decoded(decoder, dtype: torch.dtype, word: int) -> list[list[float]]:
    """Fields of four values each."""
    outputs = 2 * decoder.planes * 8 // decoder.bits
    values = floats(run(decoder.setup, decoder.asm, outputs, word), dtype)
    return [values[i : i + 4] for i in range(0, len(values), 4)]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("sums", [False, True], ids=["", "sums"])
@pytest.mark.parametrize("format", lk.format_names())
def test_every_code(format, dtype, sums):
    """decoded + constant, times unit after center: the code book's entry, rounded to dtype where it is a table's."""
    values = tuple(get_format(format).codebook().tolist())
    decoder = make_decoder(values, dtype, sums=sums)
    unit, *rounded = two_roundings(values, dtype)
    tables = [(unit * table.double()).tolist() for table in rounded]
    constants = decoder.constants or (0.0,) * (decoder.planes * 8 // decoder.bits)
    for word in words():
        fields = decoded(decoder, dtype, word)
        for i in range(8 // decoder.bits):
            for byte in range(4):
                code = word >> 8 * byte + decoder.bits * i & (1 << decoder.bits) - 1
                planes = range(i * decoder.planes, (i + 1) * decoder.planes)
                value = sum(fields[plane][byte] + constants[plane] for plane in planes)
                got = decoder.unit * (value + decoder.center)
                entry = tables[byte // 2][code] if decoder.table else values[code]
                assert got == pytest.approx(entry, rel=0 if decoder.table else 2e-7, abs=0 if decoder.table else 2e-7)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("format", [name for name in lk.format_names() if get_format(name).bits < 8])
def test_exact_tables(format, dtype):
    """exact=True: any code book of 4 or 16 entries comes out entry by entry, in its unit, without constants."""
    values = tuple(get_format(format).codebook().tolist())
    decoder = make_decoder(values, dtype, exact=True)
    unit, *tables = two_roundings(values, dtype)
    assert (decoder.constants, decoder.unit, decoder.center, decoder.planes) == ((), unit, 0.0, 1)
    rounded = [table.double().tolist() for table in tables]
    for word in words():
        for i, field in enumerate(decoded(decoder, dtype, word)):
            codes = [word >> 8 * j + decoder.bits * i & len(values) - 1 for j in range(4)]
            assert field == [rounded[j // 2][code] for j, code in enumerate(codes)]


@pytest.mark.parametrize("format", [name for name in lk.format_names() if get_format(name).bits < 8])
def test_float32_tables(format):
    """exact=True: the code book's entries, bit for bit."""
    values = tuple(get_format(format).codebook().tolist())
    decoder = make_decoder(values, torch.float32, exact=True)
    fields = 8 // decoder.bits
    for word in words():
        halves = run(decoder.setup, decoder.asm, 4 * fields, word)
        patterns = [low | high << 16 for low, high in zip(halves[::2], halves[1::2], strict=True)]
        expected = [
            values[word >> 8 * byte + decoder.bits * field & len(values) - 1]
            for field in range(fields)
            for byte in range(4)
        ]
        signed = torch.tensor([p - (p >> 31 << 32) for p in patterns], dtype=torch.int32)
        assert torch.equal(signed.view(torch.float32), torch.tensor(expected))


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
        for word in (0, MASK, 0x12345678):
            assert floats(run(decoder.setup, line, 2, word), dtype) == [value] * 4


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
