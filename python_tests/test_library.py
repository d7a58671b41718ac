"""The compiled library: what it says about itself, what refuses to load it, and that it runs without Python."""

from __future__ import annotations

import gc
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import gaussian

import loftq_kernels as lk
from loftq_kernels import threads
from loftq_kernels.initializers.drivers import compiled
from loftq_kernels.ops import extension, schemas

REPOSITORY = Path(__file__).parents[1]
OPS = torch.ops.loftq_kernels
needs_library = pytest.mark.skipif(extension.library is None, reason="the extension is not built")


def literals(source: str) -> str:
    """The C++ string literals of a text, those side by side in one."""
    return re.sub(r'"\s+"', "", source)


@needs_library
class TestThreadLimit:
    """What a container's quota allows holds for the kernels, and results do not depend on it."""

    @pytest.fixture(autouse=True)
    def as_before(self):
        yield
        extension.library.limit_threads(threads.cpu_quota())

    @pytest.mark.parametrize("quota, most", [(None, 2**31 - 1), (0.5, 1), (1.0, 1), (1.5, 2), (64.0, 64)])
    def test_a_part_of_a_processor_counts_as_one(self, quota, most):
        extension.library.limit_threads(quota)
        assert extension.library.thread_limit() == most

    @pytest.mark.parametrize("rows", [1, 40])
    def test_results_are_the_same(self, rows):
        x, packed = gaussian(rows, 300), lk.quantize(gaussian(500, 300), "nf4", 64)
        results = []
        for quota in (None, 1.0):
            extension.library.limit_threads(quota)
            results.append(lk.qlora_linear(x, packed))
        assert torch.equal(*results)

    def test_the_quota_of_this_process_holds_from_the_start(self):
        quota = threads.cpu_quota()
        assert extension.library.thread_limit() == (2**31 - 1 if quota is None else math.ceil(quota))


class TestVersions:
    def test_an_older_torch_is_refused_in_one_sentence(self):
        with pytest.raises(ImportError, match=r"torch is 2\.9\.1, and it needs 2\.10 or later: upgrade torch"):
            extension.Library(extension.LIBRARY, "2.9.1")

    @pytest.mark.parametrize("version", ["2.10.0", "2.11.0a0+git1234", "3.0.0"])
    def test_a_newer_torch_is_not(self, version, tmp_path):
        with pytest.raises(ImportError, match="there is no .*absent.so"):
            extension.Library(tmp_path / "absent.so", version)

    def test_a_file_of_another_platform(self, tmp_path):
        (tmp_path / "libloftq_torch.so").write_bytes(b"MZ")
        with pytest.raises(
            ImportError, match=rf"torch {re.escape(torch.__version__)} does not load it: .*(too short|invalid)"
        ):
            extension.Library(tmp_path / "libloftq_torch.so")

    @needs_library
    def test_a_library_of_another_version(self, monkeypatch):
        monkeypatch.setitem(extension.FUNCTIONS, "loftq_later", None)
        with pytest.raises(ImportError, match="libloftq_torch.so is of another version of .*: it has no loftq_later"):
            extension.Library(extension.LIBRARY)

    def test_the_oldest_torch_is_the_same_in_both_languages(self):
        header = (REPOSITORY / "csrc" / "aten" / "version.h").read_text()
        assert tuple(int(n) for n in re.findall(r"#define LOFTQ_TORCH_\w+ (\d+)", header)) == extension.OLDEST_TORCH

    @needs_library
    def test_build_info(self):
        info = extension.library.build_info()
        assert info["torch_at_least"] == ".".join(map(str, extension.OLDEST_TORCH))
        assert set(info) == {"torch", "torch_at_least", "compiler", "cuda"}

    @needs_library
    def test_it_needs_neither_python_nor_what_is_not_in_the_stable_interface(self):
        if sys.platform != "linux" or shutil.which("nm") is None:
            pytest.skip("there is no nm")
        listed = subprocess.run(["nm", "-D", "--undefined-only", extension.LIBRARY], capture_output=True, text=True)
        needed = {line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines()}
        assert any(name.startswith("torch_") for name in needed)
        foreign = [name for name in needed if re.match(r"_?Py[A-Z_]|_ZN?K?(2at|3c10|5torch|5caffe)", name)]
        assert not foreign


class TestSchemas:
    SCHEMAS = re.search(r"kSchemas\[\] = \{(.*?)\};", (REPOSITORY / "csrc/bindings/schemas.cpp").read_text(), re.S)

    def test_those_in_cpp_are_those_in_python(self):
        in_cpp = re.findall(r'"([^"]+)"', literals(self.SCHEMAS[1]))
        in_python = [str(getattr(OPS, name).default._schema).partition("::")[2] for name in schemas.names()]
        assert sorted(in_cpp) == sorted(in_python)


@needs_library
class TestDriver:
    def begin(self, number=None, rank=4, operand_dtype=torch.float32, cold_steps=1, warm_steps=1, group_size=64):
        weight, codebook, start = gaussian(96, 128), torch.linspace(-1, 1, 16), gaussian(128, 20)
        number = OPS.loftq_number() if number is None else number
        OPS.loftq_begin(
            number, [weight], codebook, start, rank, 1.0, False, False, operand_dtype, cold_steps, warm_steps,
            group_size, "absmax", torch.float16, False,
        )  # fmt: skip
        return number

    def test_a_number_ends(self):
        number = self.begin()
        assert OPS.loftq_step(number)
        OPS.loftq_end(number)
        OPS.loftq_end(number)
        for op in (OPS.loftq_step, OPS.loftq_results):
            with pytest.raises(ValueError, match=f"no alternation {number}"):
                op(number)

    def test_a_number_belongs_to_one_alternation(self):
        number = self.begin()
        with pytest.raises(ValueError, match=f"alternation {number} is in progress"):
            self.begin(number)
        with pytest.raises(ValueError, match="number=1000000000 is not one that loftq_number returned"):
            self.begin(10**9)
        OPS.loftq_end(number)

    def test_steps_come_before_results(self):
        number = self.begin()
        with pytest.raises(ValueError, match="no result before its first step"):
            OPS.loftq_results(number)
        OPS.loftq_step(number)
        OPS.loftq_results(number)
        with pytest.raises(ValueError, match="ended with its results"):
            OPS.loftq_step(number)
        OPS.loftq_end(number)

    def test_threads_take_turns(self):
        """Steps from four threads are those of one."""

        def take_steps(number, count):
            for _ in range(count):
                OPS.loftq_step(number)

        counts = []
        for workers in (1, 4):
            number = self.begin()
            steps = [threading.Thread(target=take_steps, args=(number, 20 // workers)) for _ in range(workers)]
            for thread in steps:
                thread.start()
            for thread in steps:
                thread.join()
            counts.append(OPS.loftq_results(number)[5][0])
            OPS.loftq_end(number)
        assert len(counts[0]) == 22 and torch.allclose(*counts, rtol=1e-6)

    @pytest.mark.parametrize(
        "wrong, message",
        [
            ({"rank": 97}, r"rank=97 is outside 1\.\.96"),
            ({"cold_steps": -1}, "cold_steps=-1"),
            ({"warm_steps": -2}, "warm_steps=-2"),
            ({"group_size": 0}, "group_size=0 is not"),
            ({"group_size": 48}, "group_size=48 is not"),
            ({"operand_dtype": torch.float64}, "operand_dtype=float64 is neither"),
        ],
    )
    def test_numbers_are_checked(self, wrong, message):
        with pytest.raises(ValueError, match=message):
            self.begin(**wrong)

    @pytest.mark.parametrize("words", ["CUDA out of memory. Tried to", "DefaultCPUAllocator: can't allocate memory"])
    def test_out_of_memory_has_its_name(self, monkeypatch, words):
        def step(number):
            raise RuntimeError(f"aten::empty failed: {words}")

        monkeypatch.setattr(OPS, "loftq_step", step, raising=False)
        with pytest.raises(torch.OutOfMemoryError, match="aten::empty failed"):
            lk.loftq_init(gaussian(96, 128), "nf4", 4, 2)

    @pytest.mark.skipif(extension._release(torch.__version__) < (2, 13), reason="torch tells its message since 2.13")
    @pytest.mark.parametrize(
        "words, calls",
        [("CUDA out of memory.", [False]), ("linalg.eigh: The algorithm failed to converge", [False, True])],
    )
    def test_only_a_failed_solver_has_a_substitute(self, words, calls):
        code = f"""
            import torch, loftq_kernels as lk
            from loftq_kernels.initializers.drivers import compiled
            def fail(*args):
                raise RuntimeError({words!r})
            library = torch.library.Library("aten", "IMPL")
            library.impl("_linalg_eigh", fail, "CPU")
            calls, alternate = [], compiled._alternate
            def record(weights, codebook, options, exact):
                calls.append(exact)
                return alternate(weights, codebook, options, exact)
            compiled._alternate = record
            try:
                lk.loftq_init(torch.randn(96, 128), "nf4", 4, 2, svd="fast")
            except RuntimeError as error:
                print(calls, type(error).__name__)
        """
        name = "OutOfMemoryError" if len(calls) == 1 else "RuntimeError"
        assert printed(code).splitlines()[-1] == f"{calls} {name}"

    def test_arguments_are_checked(self):
        with pytest.raises(ValueError, match=r"rank=4 is outside 1\.\.2"):
            OPS.loftq_begin(
                OPS.loftq_number(), [gaussian(2, 9)], torch.zeros(16), gaussian(9, 2), 4, 1.0, True, False,
                torch.float32, 1, 1, 64, "absmax", torch.float16, False,
            )  # fmt: skip

    def test_ctrl_c_between_alternations(self, monkeypatch):
        """The exception of a signal handler, whatever it is, comes through, and nothing is left behind."""
        ended, step = [], OPS.loftq_step

        def step_and_interrupt(number):
            ended.append(number)
            signal.raise_signal(signal.SIGINT)
            return step(number)

        monkeypatch.setattr(OPS, "loftq_step", step_and_interrupt, raising=False)
        with pytest.raises(KeyboardInterrupt):
            lk.loftq_init(gaussian(96, 128), "nf4", 4, 5)
        with pytest.raises(ValueError, match="no alternation"):
            OPS.loftq_results(ended[-1])

    def test_other_threads_of_python_run_during_a_step(self):
        """The interpreter lock is free while an op computes: one thread per matrix makes sense."""
        ticks, done = [], threading.Event()

        def tick():
            while not done.is_set():
                ticks.append(time.perf_counter())
                time.sleep(0.001)

        weight = gaussian(1024, 1024)
        thread = threading.Thread(target=tick)
        thread.start()
        try:
            number = OPS.loftq_number()
            OPS.loftq_begin(
                number, [weight], torch.linspace(-1, 1, 16), gaussian(1024, 40), 16, 1.0, True, False,
                torch.float32, 4, 1, 64, "absmax", torch.float16, False,
            )  # fmt: skip
            before = time.perf_counter()
            OPS.loftq_step(number)
            after = time.perf_counter()
            OPS.loftq_end(number)
        finally:
            done.set()
            thread.join()
        assert sum(before < tick < after for tick in ticks) > 3

    def test_the_exact_solver_takes_over_where_the_fast_one_fails(self, monkeypatch):
        """Two directions and hardly any noise: no block of 24 columns has full rank."""
        weight = gaussian(160, 2) @ gaussian(2, 256, seed=1)
        exact_calls, alternate = [], compiled._alternate

        def record(weights, codebook, options, exact):
            exact_calls.append(exact)
            return alternate(weights, codebook, options, exact)

        monkeypatch.setattr(compiled, "_alternate", record)
        fast = lk.loftq_init(weight, "nf4", 8, 2, svd="fast", order="svd_first")
        exact = lk.loftq_init(weight, "nf4", 8, 2, svd="exact", order="svd_first")
        assert fast.error <= exact.error * 1.01
        assert exact_calls == [False, True, True]


def printed(code: str) -> str:
    """What a Python of its own prints."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_library
def test_a_library_that_torch_refuses(tmp_path):
    """Ops exist once: a second copy cannot define them again. The process goes on, with the first one's kernels."""
    shutil.copy(extension.LIBRARY, tmp_path / "libcopy.so")
    code = f"""
        import pathlib, torch, loftq_kernels as lk
        from loftq_kernels.ops import extension
        weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(1))
        before = lk.loftq_init(weight, "nf4", 4, 2)
        try:
            extension.Library(pathlib.Path({str(tmp_path / "libcopy.so")!r}))
        except ImportError as error:
            print(error)
        after = lk.loftq_init(weight, "nf4", 4, 2)
        print(torch.equal(before.lora_A, after.lora_A), torch.equal(before.packed.codes, after.packed.codes))
    """
    message, same = printed(
        code.replace("before.weight", "before.packed").replace("after.weight", "after.packed")
    ).splitlines()
    assert re.match(r"torch \S+ refuses the kernels of .*libcopy.so: \S+.* failed: ", message) and same == "True True"


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@needs_library
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="/proc tells how much memory a process has")
class TestMemory:
    def grown_by(self, call, times: int) -> int:
        """Bytes that the process grew by in `times` calls, after as many to warm up."""
        for _ in range(times):
            call()
        gc.collect()
        before = resident_bytes()
        for _ in range(times):
            call()
        gc.collect()
        return resident_bytes() - before

    def test_calls_keep_no_tensor(self):
        packed, x = lk.quantize(gaussian(256, 256), "int4"), gaussian(64, 256)
        lora_A, lora_B, bias = gaussian(8, 256), gaussian(256, 8), gaussian(1, 256)[0]
        stored = packed.codes, packed.scale, packed.offset, packed.codebook
        calls = [
            lambda: OPS.qlora_linear(x, *stored, 64, lora_A, lora_B, 1.0, bias),
            lambda: OPS.qlora_linear_grad_input(x, *stored, 256, 64, lora_A, lora_B, 1.0),
            lambda: OPS.dequantize(*stored, 256, 64, torch.float64),
            lambda: OPS.unpack_codes(packed.codes, 4, 256),
        ]
        for call in calls:  # 2000 results of 64 KiB each would be 128 MiB
            assert self.grown_by(call, 2000) < 16 << 20

    def test_many_small_calls(self):
        packed, x = lk.quantize(gaussian(7, 64), "nf4"), gaussian(1, 64)
        stored = packed.codes, packed.scale, None, packed.codebook
        # A tensor handle and its tensor take about 300 bytes: one kept per call would be 3 MB.
        assert self.grown_by(lambda: OPS.qlora_linear(x, *stored, 64, None, None, 1.0, None), 10000) < 1 << 20

    def test_refusals_keep_nothing_either(self):
        codes = torch.zeros(1 << 16, dtype=torch.uint8)

        def refused():
            with pytest.raises(ValueError):
                OPS.pack_codes(codes.clone(), 4)

        assert self.grown_by(refused, 1000) < 16 << 20

    def test_alternations(self):
        weight = gaussian(200, 256)
        assert self.grown_by(lambda: lk.loftq_init(weight, "nf4", 4, 1), 100) < 8 << 20


@pytest.mark.slow
def test_a_program_without_python(torch_library):
    """A program calls the ops of the library, which registers schemas and kernels, through libtorch."""
    ran = subprocess.run(
        ["ctest", "-R", "torch_ops_test", "-V"], cwd=torch_library.parent, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "largest difference from float64" in ran.stdout


@needs_library
def test_warns_in_one_sentence_about_a_missing_library():
    code = """
        import pathlib, warnings
        exists = pathlib.Path.exists
        pathlib.Path.exists = lambda path: "libloftq_torch" not in path.name and exists(path)
        import torch, loftq_kernels as lk
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            lk.quantize(torch.ones(2, 64), "nf4")
        print(*(str(warning.message) for warning in caught), sep="\\n")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=REPOSITORY, capture_output=True, text=True, env=os.environ
    )
    (line,) = done.stdout.splitlines()
    assert re.search(r"cpu tensors .* extension did not load \(there is no .*libloftq_torch.so\); build it with", line)
