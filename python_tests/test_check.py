"""`loftq-kernels check`: right kernels pass, wrong ones fail with the case that shows it, and nothing ends the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import FORMATS

from loftq_kernels import cli
from loftq_kernels.cli import check, check_cases, check_paths
from loftq_kernels.cli.check_paths import ISA_VARIABLE
from loftq_kernels.cli.check_rows import Case, Finding, KernelPath, Row, attempt
from loftq_kernels.ops import extension

OPS = torch.ops.loftq_kernels
SOME_FORMATS = ("nf4", "int8")
needs_extension = pytest.mark.skipif(extension.library is None, reason="the extension is not built")
ISAS = extension.library.cpu_isas() if extension.library is not None else ()


def lines(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def constant(ratio: float, label: str = "a case") -> Case:
    return Case(label, lambda: Finding(ratio, f"ratio {ratio}"))


class Replaced:
    """The ops, some of them replaced."""

    def __init__(self, **wrong):
        self.__dict__.update(wrong)

    def __getattr__(self, name: str):
        return getattr(OPS, name)


def row_of(name: str, monkeypatch, **wrong) -> Row:
    """The row of a path, of the first instruction set, with some ops replaced."""
    monkeypatch.setattr(check_paths, "OPS", Replaced(**wrong))
    return attempt(next(path for path in check_paths.cpu_paths(SOME_FORMATS) if path.name == name))


@needs_extension
class TestThisMachine:
    def test_every_instruction_set_passes(self, capsys):
        assert check.run_checks(formats=SOME_FORMATS) == 0
        header, *rows, summary = lines(capsys)
        assert all(row.endswith("  pass") or "not here: " in row for row in rows)
        start = header.index("result")
        assert all(row[start:].startswith(("pass", "not here")) for row in rows), "columns stand below each other"
        for isa in ISAS:
            assert sum(row.startswith(f"CPU {isa} ") for row in rows) == 6
        assert f"{sum(row.endswith('pass') for row in rows)} passed, 0 failed" in summary

    @pytest.mark.slow
    def test_command_line(self, capsys):
        assert cli.main(["check"]) == 0
        out = capsys.readouterr().out
        assert "FAIL" not in out and "0 failed" in out

    @pytest.mark.parametrize("before", [None, "scalar"])
    def test_instruction_set_is_forced_and_given_back(self, before, monkeypatch):
        monkeypatch.delenv(ISA_VARIABLE, raising=False)
        if before is not None:
            monkeypatch.setenv(ISA_VARIABLE, before)
        used = {}
        for isa in ISAS:
            case = Case("", lambda isa=isa: used.update({isa: extension.library.cpu_isa()}) or Finding(0, ""))
            row = attempt(KernelPath("", "", [case], setting=lambda isa=isa: check_paths.forced_isa(isa)))
            assert row.outcome == "pass"
        assert used == {isa: isa for isa in ISAS}
        assert os.environ.get(ISA_VARIABLE) == before

    def test_an_instruction_set_that_is_not_here(self, monkeypatch):
        monkeypatch.delenv(ISA_VARIABLE, raising=False)
        row = attempt(KernelPath("", "", [constant(0)], setting=lambda: check_paths.forced_isa("mmx")))
        assert row.outcome == "FAIL" and "LOFTQ_CPU_ISA=mmx" in row.said
        assert ISA_VARIABLE not in os.environ

    @pytest.mark.parametrize("transposed", [False, True])
    def test_products_touch_every_combination(self, transposed):
        """Each format with each number of rows, dtype and adapter; each group size with each number of rows."""
        products = check_paths._cpu_products(FORMATS, transposed)
        seen = {(p.layer.format, p.rows, p.dtype) for p in products}
        assert len(seen) == len(FORMATS) * len(check_paths.ROWS) * 3
        groups = {(p.layer.group_size, p.rows, p.dtype, p.adapted) for p in products}
        assert len(groups) == 5 * len(check_paths.ROWS) * 3 * 2
        assert {(p.dtype, p.adapted, p.biased) for p in products} == {
            (dtype, adapted, biased)
            for dtype in check_cases.DTYPES
            for adapted in (False, True)
            for biased in ([False] if transposed else [False, True])
        }


def _changed(tensor: torch.Tensor, change) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] = change(changed.view(-1)[-1])
    return changed


def drops_bias(*args):
    return OPS.qlora_linear(*args[:-1], None)


def scales_adapter_twice(*args):
    return OPS.qlora_linear(*args[:-2], args[-2] ** 2, args[-1])


def forgets_last_column(x, *args):
    x = x.clone()
    x[..., -1] = 0
    return OPS.qlora_linear(x, *args)


def rounds_results(x, *args):
    return OPS.qlora_linear(x, *args).to(torch.bfloat16).to(x.dtype)


def one_wrong_value(*args):
    return _changed(OPS.qlora_linear(*args), lambda value: value + 1)


def not_a_number(*args):
    return _changed(OPS.qlora_linear(*args), lambda value: torch.nan)


def another_dtype(*args):
    return OPS.qlora_linear(*args).double()


def one_row(*args):
    return OPS.qlora_linear(*args)[:1]


def leaves_out_low_rank(grad_y, *args):
    return OPS.qlora_linear_grad_input(grad_y, *args[:-3], None, None, 0.0)


def last_bit_of_a_scale(*args):
    codes, scale, offset = OPS.quantize(*args)
    return codes, _changed(scale, lambda value: value * (1 + torch.finfo(scale.dtype).eps)), offset


def stale_residual(weight, low_rank, *args):
    return OPS.quantize_residual_(weight, low_rank.clone(), *args)


def wrong_norm(*args):
    *stored, norm = OPS.quantize_residual_(*args)
    return *stored, norm * (1 + 1e-9)


def rounds_twice(*args):
    return OPS.dequantize(*args[:-1], torch.float16).to(args[-1])


def swaps_columns(*args):
    return OPS.unpack_codes(*args).flip(1)


WRONG = [
    *(("qlora_linear", op) for op in (drops_bias, scales_adapter_twice, forgets_last_column, rounds_results)),
    *(("qlora_linear", op) for op in (one_wrong_value, not_a_number, another_dtype, one_row)),
    ("qlora_linear_grad_input", leaves_out_low_rank),
    ("quantize", last_bit_of_a_scale),
    ("quantize_residual_", stale_residual),
    ("quantize_residual_", wrong_norm),
    ("dequantize", rounds_twice),
    ("unpack_codes", swaps_columns),
]


@needs_extension
@pytest.mark.parametrize(("op", "wrong"), WRONG, ids=lambda value: getattr(value, "__name__", None))
def test_a_wrong_kernel_fails(op, wrong, monkeypatch):
    name = "pack, unpack" if op == "unpack_codes" else op
    assert row_of(name, monkeypatch).outcome == "pass"
    row = row_of(name, monkeypatch, **{op: wrong})
    assert row.outcome == "FAIL" and not row.worst <= 1
    if "linear" in op:
        assert row.said.startswith(SOME_FORMATS) and "M=" in row.said


@needs_extension
def test_the_worst_case_is_named(monkeypatch):
    """By format, sizes, rows of x and dtype, with both errors."""

    def wrong(x, codes, scale, offset, codebook, *args):
        factor = 1.01 if offset is not None and x.shape[0] == 17 and x.dtype == torch.float32 else 1.0
        return OPS.qlora_linear(x, codes, scale, offset, codebook, *args) * factor

    row = row_of("qlora_linear", monkeypatch, qlora_linear=wrong)
    assert row.outcome == "FAIL" and row.worst > 1000
    assert row.said.startswith("int8 131x330 in ") and "M=17 float32" in row.said and "plain torch" in row.said


@needs_extension
def test_a_failure_leaves_the_other_paths_alone(monkeypatch, capsys):
    monkeypatch.setattr(check_paths, "OPS", Replaced(dequantize=rounds_twice))
    assert check.run_checks(formats=SOME_FORMATS) == 1
    rows = [line for line in lines(capsys)[1:-1] if not line.startswith("    ") and "not here" not in line]
    failed = [row for row in rows if not row.endswith("  pass")]
    assert len(failed) == len(ISAS) and all("dequantize" in row and row.endswith("  FAIL") for row in failed)


def halved_factor(init):
    init.lora_B = init.lora_B / 2
    return init


def another_end(init):
    init.errors = [*init.errors[:-1], init.errors[-1] * 1.01]
    return init


def one_alternation(init):
    init.errors = init.errors[:1]
    return init


@needs_extension
@pytest.mark.parametrize("change", [halved_factor, another_end, one_alternation])
def test_a_wrong_initializer_fails(change, monkeypatch):
    assert row_of("LoftQ initializer", monkeypatch).outcome == "pass"
    run = check_cases.Initialization.run

    def changed(self, device, backend=None):
        init = run(self, device, backend)
        return init if backend == "reference" else change(init)

    monkeypatch.setattr(check_cases.Initialization, "run", changed)
    row = row_of("LoftQ initializer", monkeypatch)
    assert row.outcome == "FAIL" and row.worst > 1


class TestRows:
    def test_an_exception_is_a_row(self, capsys):
        def fails() -> Finding:
            raise RuntimeError("\nan illegal address\nTraceback of C++")

        paths = [
            KernelPath("CPU", "first", [constant(0.5), Case("nf4 M=3", fails), constant(2.0)]),
            KernelPath("CPU", "second", [constant(1.0)]),
        ]
        assert check.run_checks(paths) == 1
        _, first, said, second, summary = lines(capsys)
        assert first.split()[:3] == ["CPU", "first", "1"] and first.endswith("FAIL")
        assert said == "    nf4 M=3: RuntimeError: an illegal address"
        assert second.endswith("pass") and "1.00" in second
        assert summary.startswith("1 passed, 1 failed, 0 not here; ")

    def test_what_cannot_be_asked_is_a_row(self):
        def fails() -> str:
            raise RuntimeError("the driver is older than the runtime")

        row = attempt(KernelPath("cuda:0", "decode", [constant(0)], missing=fails))
        assert row.outcome == "FAIL" and row.cases == 0 and "driver is older" in row.said

    def test_what_is_not_here_is_no_failure(self, capsys):
        paths = [KernelPath("cuda:0", "decode", [constant(9)], missing=lambda: "triton is not installed")]
        assert check.run_checks(paths) == 0
        _, row, summary = lines(capsys)
        assert row.endswith("not here: triton is not installed")
        assert summary.startswith("0 passed, 0 failed, 1 not here; ")

    @pytest.mark.parametrize("bad", [1.0001, float("inf"), float("nan")])
    def test_the_worst_case_decides(self, bad, capsys):
        cases = [constant(0.2, "good"), constant(bad, "bad"), constant(0.9, "nearly")]
        assert check.run_checks([KernelPath("CPU", "path", cases)]) == 1
        assert lines(capsys)[2] == f"    bad: ratio {bad}"

    def test_a_path_without_cases_fails(self):
        assert attempt(KernelPath("CPU", "path")).outcome == "FAIL"

    def test_an_interrupt_goes_through(self):
        def interrupted() -> Finding:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            attempt(KernelPath("CPU", "path", [Case("", interrupted)]))


class TestWhatIsMissing:
    def test_without_extension(self, monkeypatch, capsys):
        monkeypatch.setattr(extension, "library", None)
        monkeypatch.setattr(extension, "LOAD_ERROR", "no such file")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert check.run_checks() == 0
        _, cpu, cuda, _ = lines(capsys)
        assert cpu.startswith("CPU ") and "not here: the extension did not load (no such file)" in cpu
        assert cuda.startswith("CUDA ") and "not here: torch" in cuda and "sees no CUDA device" in cuda

    @needs_extension
    def test_extension_without_cuda(self, monkeypatch):
        info = {**extension.library.build_info(), "cuda": False}
        monkeypatch.setattr(extension, "library", SimpleNamespace(build_info=lambda: info))
        rows = [attempt(path) for path in check_paths.cuda_paths("cuda:0", FORMATS)]
        assert len(rows) == 8 and {row.outcome for row in rows} == {"not here"}
        assert all("built without CUDA" in row.said for row in rows)

    def test_triton_on_a_device_that_it_does_not_serve(self):
        if os.environ.get("TRITON_INTERPRET") == "1":
            pytest.skip("CPU tensors are served")
        rows = [attempt(path) for path in check_paths.triton_paths("cpu", FORMATS)]
        assert len(rows) == 9 and {row.outcome for row in rows} == {"not here"}


def test_cases_of_the_cuda_ops(monkeypatch):
    """On CPU tensors, where the same ops are: what the cases ask is right."""
    monkeypatch.setattr(check_paths, "_no_cuda_kernel", lambda op: None)
    rows = [attempt(path) for path in check_paths.cuda_paths("cpu", SOME_FORMATS)]
    assert len(rows) == 8 and {row.outcome for row in rows} == {"pass"}


@pytest.mark.parametrize("name", ["jacobi_eigh", "jacobi_svd", "cholesky_inverse_factor"])
def test_a_wrong_decomposition_fails(name, monkeypatch):
    def wrong(matrix):
        *results, info = getattr(OPS, name)(matrix)
        return *(out * (1 + 1e-4) for out in results), info

    ops = SimpleNamespace(**{name: wrong})
    monkeypatch.setattr(check_cases.torch, "ops", SimpleNamespace(loftq_kernels=ops))
    assert check_cases.decomposing(name, 16, torch.float32, "cpu").ratio > 1


# Run as a script, for Triton decides whether to interpret when a kernel is decorated.
INTERPRETED = """
import dataclasses, json, sys
import interpreter
interpreter.repair()
from loftq_kernels.cli import check_paths, check_rows
wrong = sys.argv[1] == "wrong"
if wrong:
    from loftq_kernels.ops import triton_backend
    for name in ("qlora_linear", "qlora_linear_multi", "qlora_linear_grad_input", "dequantize"):
        def op(*args, right=getattr(triton_backend, name), **options):
            return right(*args, **options) * 1.02
        setattr(triton_backend, name, op)
paths = check_paths.triton_paths("cpu", ["nf4", "int2"], results=67, summed=130, wide=300)
print(json.dumps([dataclasses.asdict(check_rows.attempt(path)) for path in paths]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kernels", "outcome"), [("right", "pass"), ("wrong", "FAIL")])
def test_triton_interpreted(kernels, outcome):
    pytest.importorskip("triton")
    tests = Path(__file__).parent
    places = os.pathsep.join([str(tests), str(tests.parent)])
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, kernels],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": places},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(done.stdout)
    assert len(rows) == 9
    assert {row["outcome"] for row in rows} == {outcome}, [row for row in rows if row["outcome"] != outcome]


@pytest.mark.gpu
def test_on_gpu():
    """The first device: every path that its build has passes."""
    for paths in (check_paths.cuda_paths, check_paths.triton_paths):
        for path in paths("cuda:0", FORMATS):
            row = attempt(path)
            assert row.outcome != "FAIL", check.format_row(row)
