"""Every shipped configuration compiled to machine code for GPUs that need not be there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, product

import pytest
import torch

from bench.bench_sass import decode_keys
from bench.sass import (
    TARGETS,
    TENSOR_CORES,
    Case,
    Machine,
    captured_launches,
    launches,
    machine_code,
    main_loop,
    parse,
)
from loftq_kernels.formats import empty_packed, get_format
from loftq_kernels.triton_kernels import configs
from loftq_kernels.triton_kernels.configs import (
    DECODE_BLOCK_M,
    DECODE_FLOAT32,
    TABLE,
    Config,
    Key,
    choose,
    rows_of_table,
    splits,
    why_invalid,
)
from loftq_kernels.triton_kernels.dequantize import launch_dequantize
from loftq_kernels.triton_kernels.device import DEVICES, describe
from loftq_kernels.triton_kernels.grad_input import launch_grad_input
from loftq_kernels.triton_kernels.lora import launch_lora_down, launch_lora_up
from loftq_kernels.triton_kernels.prefill_linear import launch_prefill_linear
from loftq_kernels.triton_kernels.tiles import tile_decoder

H200 = DEVICES[90]
# Instructions per weight in the main loop, on sm_90 with groups of 64 and M <= 8, of tall shapes and of small ones. The
# aims are 4.5 (nf4), 2.5 (nf2), 2.6 (int4) and 1.8 (int2), which small shapes of int2 miss because of their offsets.
LIMITS = {
    "nf4": (3.6, 3.6),
    "nf2": (2.0, 2.2),
    "int4": (2.35, 2.35),
    "int4_sym": (2.1, 2.1),
    "int2_sym": (1.5, 1.8),
    "int2": (1.8, 2.1),
}
DECODE_CASES = [
    (format, capability, block_m, "tall")
    for format in ("nf2", "nf4", "int4", "int8")
    for capability in TARGETS
    for block_m in DECODE_BLOCK_M
] + [("int2", 90, rows, shape) for rows in DECODE_BLOCK_M for shape in ("tall", "small")]


def config_of(format: str, capability: int, rows: int, shape: str) -> Config:
    key = next(key for key in decode_keys(format, capability) if (key.rows, key.shape) == (rows, shape))
    return rows_of_table(key)[0]


def checked(case: Case, capability: int) -> Machine:
    """The machine code of the case's launch, which fits the device and spills nothing."""
    (launch,) = launches(case)
    code = machine_code(launch, capability)
    assert code.spills == 0
    assert code.shared <= describe(capability).shared_memory
    return code


@pytest.mark.parametrize("format, capability, block_m, shape", DECODE_CASES)
def test_decode(format, capability, block_m, shape):
    """With everything that a launch may have: adapters to choose from, bias, splits."""
    config = config_of(format, capability, block_m, shape)
    code = checked(Case("decode", format, config, dtype=torch.float16, extras=True), capability)
    assert code.tensor_instructions() > 0


@pytest.mark.parametrize("shape", ["tall", "small"])
@pytest.mark.parametrize("format", LIMITS)
def test_instructions_per_weight(format, shape):
    case = Case("decode", format, config_of(format, 90, 8, shape))
    code = checked(case, 90)
    assert code.loop_instructions() / case.weights_per_thread() <= LIMITS[format][shape == "small"]
    # No weight is moved between lanes or to shared memory: the few shuffles move the constants that correct fields.
    assert code.loop["SHFL"] <= 16 and code.loop["HGMMA"] == 0


# int8 in bfloat16 has two planes, and in float16 one.
FLOAT32_ADAPTERS = [
    (*case, dtype)
    for case, dtype in zip(
        product(("int2", "nf4", "int8"), (80, 90, 100), DECODE_BLOCK_M),
        cycle((torch.float16, torch.bfloat16, torch.bfloat16, torch.float16)),
        strict=False,
    )
]


@pytest.mark.parametrize("format, capability, block_m, dtype", FLOAT32_ADAPTERS, ids=str)
def test_decode_float32_adapters(format, capability, block_m, dtype):
    """Adapters that the kernel converts as it loads them, of a rank that fills a block of ranks."""
    config = config_of(format, capability, block_m, "tall")
    case = Case("decode", format, config, dtype=dtype, rank=32, extras=True, adapter_dtype=torch.float32)
    assert checked(case, capability).tensor_instructions() > 0


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("format", ["nf2", "int2", "int4"])
@pytest.mark.parametrize("group_size", [32, 128, 256, -1])
def test_decode_groups(group_size, format, extras):
    """The other group sizes, with a tail of K."""
    config = config_of(format, 90, 8, "tall")
    case = Case("decode", format, config, group_size, in_features=4096 + 16, extras=extras)
    assert checked(case, 90).tensor_instructions() > 0


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("extras", [False, True])
def test_decode_float32(extras, capability):
    checked(Case("decode", "nf4", DECODE_FLOAT32, dtype=torch.float32, extras=extras), capability)


ODD_CASES = [("decode", 8, "nf4"), ("decode", 16, "nf4")]
ODD_CASES += [(kernel, 512, format) for kernel in ("prefill", "grad_input") for format in ("nf4", "int2")]


@pytest.mark.parametrize("kernel, rows, format", ODD_CASES)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_odd_shapes(kernel, rows, format, capability):
    """What `choose` gives for shapes that are no multiples of 16, whose elements are loaded and stored one by one."""
    device = replace(describe(capability), multiprocessors=132)
    config = choose(kernel, device, get_format(format).bits, rows, 4095, 4095)
    checked(Case(kernel, format, config, out_features=4095, in_features=4095, rank=12, extras=True), capability)


def tile_cases() -> Iterator:
    """Every tile of the table at every width, with groups that share a step (32), that hold steps (64) and that are
    whole rows. sm_89 has sm_80's tiles and tensor cores: only groups of 32, the worst, are compiled for it. Those come
    without adapter and bias, as ptxas was seen to spill less with them."""
    dtypes = cycle((torch.bfloat16, torch.float16))
    for kernel, capability in product(("prefill", "grad_input"), TARGETS):
        for format, group_size in product(("int2", "int4", "int8"), (32,) if capability == 89 else (32, 64, -1)):
            # Offsets take registers, and tables are decoded in another way: one of the three group sizes has no offsets
            # but a table.
            named = format.replace("int", "nf") if group_size == 64 and format != "int8" else format
            for config in rows_of_table(Key(kernel, capability, get_format(format).bits, 512, "tall")):
                case = Case(kernel, named, config, group_size, next(dtypes), extras=group_size != 32)
                tile = f"{config.block_m}x{config.block_n}"
                yield pytest.param(case, capability, id=f"{kernel}-sm_{capability}-{tile}-{named}-{group_size}")


@pytest.mark.parametrize("case, capability", list(tile_cases()))
def test_tiles(case, capability):
    """The main loop multiplies on the device's own kind of tensor cores. A trap in place of a kernel, which Triton 3.6
    has made for sm_100, would have no such loop."""
    code = checked(case, capability)
    assert code.loop[TENSOR_CORES[capability]] > 0
    assert 4 <= code.loop_instructions() / case.weights_per_thread() <= 64


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", [Case("dequantize"), Case("lora", extras=True)], ids=lambda case: case.kernel)
def test_small_kernels(case, capability):
    for launch in launches(case):
        code = machine_code(launch, capability)
        assert code.spills == 0 and code.shared <= describe(capability).shared_memory
        assert (code.tensor_instructions() > 0) == (launch.name in ("lora_down", "lora_up"))


def test_grids_of_a_million_rows():
    """CUDA takes 2^31 - 1 blocks along x, but 65535 along y and z."""
    rows = 1_000_000
    codebook = get_format("nf4").codebook()
    decoder = tile_decoder(tuple(codebook.tolist()), torch.bfloat16, True, along=True)
    tall, narrow = (empty_packed(n, 1024, "nf4", 64, device="meta") for n in (rows, 256))
    x, y = (torch.empty(8 * rows, k, dtype=torch.bfloat16, device="meta") for k in (1024, 256))
    tiles = [rows_of_table(Key(kernel, 90, 4, 64, "tall"))[0] for kernel in ("prefill", "grad_input")]
    with captured_launches() as launched:
        launch_dequantize(tall.codes, tall.scale, None, codebook, 64, x[:rows])
        h = launch_lora_down(x, x[:16].unsqueeze(0), None, 1.0, 132)
        launch_lora_up(y, h, y[:16].T.unsqueeze(0), None)
        stored = narrow.codes, narrow.scale, None, codebook, 64, decoder
        launch_prefill_linear(x, *stored, None, None, None, None, y, tiles[0])
        launch_grad_input(y, *stored, None, None, x, tiles[1])
    assert len(launched) == 5
    for launch in launched:
        first, *others = launch.grid
        assert first < 2**31 and all(count <= 65535 for count in others)


def test_table_is_valid():
    """By the rules that candidates of a search and rows of its cache have to keep as well."""
    for key, rows in TABLE.items():
        for capability in (*TARGETS, 120):
            if configs.architectures(capability, key.kernel)[0] != key.architecture:
                continue
            for config in rows:
                for bits in (key.bits,) if key.bits else (2, 4, 8):
                    for group_size in (32, 64, 128, 256, -1):
                        fitted = config.for_group(group_size) if key.kernel == "decode" else config
                        assert why_invalid(key.kernel, fitted, bits, capability, group_size) is None
        if key.kernel == "decode":
            assert [config.block_m for config in rows] == [key.rows]


def test_why_invalid():
    for kernel, config, group_size, capability, rule in (
        ("decode", Config(8, 32, 64, 4, 3, 4), 64, 90, "warps"),
        ("decode", Config(8, 32, 128, 2, 3, 4), 256, 90, "256"),
        ("decode", Config(16, 128, 512, 2, 8, 4), 64, 89, "shared memory"),
        ("decode", Config(32, 32, 64, 2, 3, 4), 64, 90, "block_m=32"),
        ("decode", Config(8, 32, 64, 2, 3), 64, 90, "fill"),
        ("prefill", Config(256, 128, 64, 4, 3), 64, 90, "accumulators"),
        ("prefill", Config(64, 64, 32, 4, 3), 64, 90, "block_k"),
        ("prefill", Config(256, 128, 64, 8, 4), 64, 120, "shared memory"),
        ("grad_input", Config(8, 64, 64, 4, 3), 64, 90, "16"),
        ("grad_input", Config(96, 64, 64, 4, 3), 64, 90, "powers of two"),
    ):
        assert rule in why_invalid(kernel, config, 4, capability, group_size)


def test_choice():
    with pytest.raises(ValueError, match="7.5"):
        choose("decode", replace(H200, capability=75), 4, 1, 4096, 4096)
    config = Config(8, 32, 256, 2, 4, 4)
    assert splits(config, 4, 1, 4096, 4096, 132) == 4  # 512 programs for 132 multiprocessors
    assert splits(config, 4, 1, 1 << 20, 4096, 132) == 1
    assert splits(config, 4, 1, 32, 64, 132) == 1  # one step cannot be shared
    assert splits(Config(64, 64, 64, 4, 4, 2), 4, 64, 4096, 4096, 132) == 4  # 256 programs
    assert splits(Config(64, 64, 64, 4, 4, 2), 2, 64, 4096, 4096, 132) == 2  # parts no larger than the codes
    assert splits(Config(64, 64, 64, 4, 4), 4, 64, 4096, 4096, 132) == 1
    assert choose("decode", H200, 4, 9, 1 << 15, 4096) == TABLE[Key("decode", 80, 4, 16, "tall")][0]
    newest = replace(describe(120), capability=120, multiprocessors=132)
    assert choose("decode", newest, 8, 1, 4096, 4096) == TABLE[Key("decode", 80, 8, 8, "small")][0]
    for rows, sizes in ((4096, (256, 128)), (256, (128, 64)), (64, (64, 64)), (20, (32, 64)), (1, (32, 64))):
        config = choose("prefill", H200, 4, rows, 4096, 4096)
        assert (config.block_m, config.block_n) == sizes
    assert choose("grad_input", newest, 4, 4096, 4096, 4096) in TABLE[Key("grad_input", 80, 0, 0, "")]


def test_a_row_of_a_newer_architecture_leaves_the_others_to_the_older(monkeypatch):
    """What a search printed can be pasted row by row."""
    key, config = Key("decode", 90, 4, 8, "tall"), Config(8, 128, 128, 4, 3, 2)
    monkeypatch.setitem(TABLE, key, (config,))
    assert rows_of_table(key) == (config,)
    assert rows_of_table(key._replace(bits=2)) == TABLE[key._replace(bits=2, architecture=80)]
    assert rows_of_table(key._replace(architecture=89)) == TABLE[key._replace(architecture=80)]


def test_the_row_that_says_most_is_taken(monkeypatch):
    for i, row in enumerate(((0, 0, ""), (8, 0, ""), (0, 64, "tall"), (8, 64, "tall"))):
        monkeypatch.setitem(TABLE, Key("grad_input", 90, *row), (Config(64, 64, 64, 4, i + 1),))
        taken = [
            rows_of_table(Key("grad_input", 90, *key))[0].num_stages - 1 for key in ((8, 64, "tall"), (4, 64, "tall"))
        ]
        assert taken == [i, i & 2]


def test_main_loop():
    """The loop that multiplies is found: not a longer one before it that does not, nor the outer one around it."""
    lines = [".L_a:", *["/*0000*/ IADD3 R1, R1, R2 ;"] * 9, "/*0010*/ @P0 BRA `(.L_a) ;"]
    lines += [".L_b:", "/*0020*/ MOV R1, R2 ;", ".L_c:", "/*0030*/ @!P1 HMMA.16816.F32 R0, R4, R8, R0 ;"]
    lines += ["/*0040*/ @P0 BRA `(.L_c) ;", "/*0050*/ @P1 BRA `(.L_b) ;", "/*0060*/ BRA `(.L_end) ;", ".L_end:"]
    instructions, loops = parse("\n".join("  " + line if "/*" in line else line for line in lines))
    assert len(loops) == 3
    assert main_loop(instructions, loops) == {"HMMA": 1, "BRA": 1}


def test_main_loop_with_waits():
    """A loop that waits within the main loop is part of it. Code that waits behind the kernel's end makes no loop."""
    lines = [".L_a:", "UTCHMMA gdesc[UR4], tmem[UR6] ;", ".L_spin:", "SYNCS R1 ;", "@!P0 BRA `(.L_spin) ;"]
    lines += [".L_back:", "@P1 BRA `(.L_a) ;", "EXIT ;", "SYNCS R1 ;", "BRA `(.L_back) ;"]
    instructions, loops = parse("\n".join(line if line.startswith(".") else f"  /*0000*/ {line}" for line in lines))
    assert loops == [(1, 2), (0, 3)]
    assert main_loop(instructions, loops) == {"UTCHMMA": 1, "SYNCS": 1, "BRA": 2}
