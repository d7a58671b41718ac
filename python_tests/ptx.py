"""Runs the PTX of the kernels' inline asm on NumPy arrays: straight-line instructions on 32-bit registers.

Every register is a uint32 array, an element for each time that the text runs; arrays are broadcast. What is not known
here raises ValueError: an instruction, a register that is not declared where it is used or not written before it is
read, a second declaration of one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

THREAD = 21  # %tid.x: any number but 0, which would hide an asm that depends on it


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Four bytes out of the eight of a and b; bit 3 of a selector's nibble replicates the byte's sign."""
    pool, result = b.astype(np.uint64) << 32 | a, np.uint32(0)
    for shift in (0, 4, 8, 12):
        nibble = selector >> shift & 15
        byte = (pool >> 8 * (nibble & 7).astype(np.uint64) & 255).astype(np.uint32)
        byte = np.where(nibble & 8, (byte >> 7) * np.uint32(255), byte)
        result = result | byte << 2 * shift
    return result


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Bitwise: the bit of table whose index is the bits of a, b, c."""
    result = np.uint32(0)
    for index in range(8):
        if int(table) >> index & 1:
            result = result | (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return result


OPERATIONS = {
    "mov.u32": (1, lambda a: a),
    "mov.b32": (1, lambda a: a),
    "and.b32": (2, np.bitwise_and),
    "xor.b32": (2, np.bitwise_xor),
    "shl.b32": (2, lambda a, b: np.where(b < 32, a << (b & 31), np.uint32(0))),
    "shr.u32": (2, lambda a, b: np.where(b < 32, a >> (b & 31), np.uint32(0))),
    "prmt.b32": (3, prmt),
    "lop3.b32": (4, lop3),
}

Registers = dict[str, np.ndarray | None]  # None: declared, not written


def run(text: str, inputs: Sequence[np.ndarray], outputs: int, function: Registers) -> list[np.ndarray]:
    """The operands $0, $1, ... that text writes, `outputs` of them; its inputs are those that follow.

    function: the registers that other texts have declared outside of braces, to which this one's are added.
    """
    operands = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    written = {f"${i}": None for i in range(outputs)}
    scopes: list[Registers] = [operands, written, function]
    for statement in re.findall(r"[{}]|[^;{}]+", text):
        statement = statement.strip()
        if statement == "{":
            scopes.append({})
        elif statement == "}":
            scopes.pop()
        elif statement:
            _step(statement, scopes)
    missing = [name for name, value in written.items() if value is None]
    if missing or len(scopes) != 3:
        raise ValueError(f"{', '.join(missing) or 'a brace'} is missing in: {text}")
    return list(written.values())


def _step(statement: str, scopes: list[Registers]) -> None:
    name, _, rest = statement.partition(" ")
    target, *sources = (operand.strip() for operand in rest.split(","))
    if name == ".reg":
        _declare(statement, scopes[-1])
        return
    count, operation = OPERATIONS.get(name, (None, None))
    if count != len(sources):
        raise ValueError(f"no such instruction: {statement}")
    values = [_value(source, scopes, statement) for source in sources]
    _scope_of(target, scopes[1:], statement)[target] = operation(*values).astype(np.uint32)


def _declare(statement: str, scope: Registers) -> None:
    names = re.fullmatch(r"\.reg \.b32 (\w+(?:, *\w+)*)", statement)
    if names is None:
        raise ValueError(f"no such declaration: {statement}")
    for name in re.findall(r"\w+", names[1]):
        if name in scope:
            raise ValueError(f"{name} is declared twice: {statement}")
        scope[name] = None


def _value(source: str, scopes: list[Registers], statement: str) -> np.ndarray:
    if source == "%tid.x":
        return np.uint32(THREAD)
    if source[:1].isdigit():
        return np.uint32(int(source, 0))
    value = _scope_of(source, scopes, statement)[source]
    if value is None:
        raise ValueError(f"{source} is read before it is written: {statement}")
    return value


def _scope_of(name: str, scopes: list[Registers], statement: str) -> Registers:
    """The innermost scope that has the register."""
    for scope in reversed(scopes):
        if name in scope:
            return scope
    raise ValueError(f"no register {name}: {statement}")
