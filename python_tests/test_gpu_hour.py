"""What `make gpu` does with its nine minutes: the order of cases and steps, time limits, and what is left when cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import gpu_session
import pytest
from gpu_session import Case, GpuSession, in_order_of_risk

from bench import bench_gpu, gpu_hour
from bench.gpu_hour import NOT_RUN, OK, Done, Hour, Step

HERE = Path(__file__).parent


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class TestOrderOfCases:
    def test_each_kernel_once_before_any_grid(self):
        big = [Case(f"python_tests/test_gpu.py::big[{m}-{n}]", {"m": m, "n": n}) for m in (64, 1, 8) for n in (128, 32)]
        shapes = [(33, 64, "nf4", "decode"), (2, 7, "nf4", "decode"), (9, 9, "nf4", "prefill")]
        tuples = [Case(f"python_tests/test_ops.py::product[{s}]", {"shape": s}) for s in shapes]
        other = [Case("python_tests/test_what_is_new.py::alone", {})]
        ordered = in_order_of_risk([*other, *big, *tuples])
        assert ordered[:4] == [tuples[1], tuples[2], big[3], other[0]]
        assert ordered[4] == tuples[0]
        assert sorted(ordered) == sorted([*other, *big, *tuples])
        assert [c for c in ordered if c in big] != [big[3], *(c for c in big if c is not big[3])]  # a mixed order

    def test_the_same_order_in_every_run(self):
        cases = [Case(f"test_a.py::f[{i}]", {"i": i}) for i in range(50)]
        assert in_order_of_risk(cases) == in_order_of_risk(cases)

    def test_files_of_the_order_exist(self):
        files = {path.stem for path in HERE.rglob("test_*.py")}
        assert files.issuperset(gpu_session.RISK)


class TestSession:
    def session(self, tmp_path, **arguments):
        written = {}

        def write(path, found):
            written.update(json.loads(json.dumps(found)))

        return GpuSession(tmp_path / "report.json", 10, write=write, **arguments), written

    def case(self, session, name, outcome="passed", message=""):
        assert session.pytest_runtest_protocol(SimpleNamespace(nodeid=name)) is None
        report = dict(nodeid=name, duration=0.5, outcome=outcome, longrepr=None, longreprtext=f"{message}\nmore")
        session.pytest_runtest_logreport(
            SimpleNamespace(**report, passed=outcome == "passed", failed=outcome == "failed")
        )
        session.pytest_runtest_logfinish(name)

    def test_what_the_time_leaves_is_named(self, tmp_path):
        clock = Clock()
        session, written = self.session(tmp_path, clock=clock)
        self.case(session, "a")
        self.case(session, "b", "failed", "E  wrong")
        clock.now += 10
        assert session.pytest_runtest_protocol(SimpleNamespace(nodeid="c")) is True
        session.pytest_sessionfinish()
        assert written["summary"] == {"passed": 1, "failed": 1, "not run": 1, "finished": True, "device lost": None}
        assert written["not run"] == {"c": "the time was up"}
        assert written["cases"]["b"] == {"outcome": "failed", "seconds": 0.5, "message": "E  wrong"}

    def test_the_report_says_which_case_runs(self, tmp_path):
        session, written = self.session(tmp_path, clock=Clock())
        self.case(session, "a")
        session.pytest_runtest_protocol(SimpleNamespace(nodeid="b"))
        gpu_session.faulthandler.cancel_dump_traceback_later()
        assert written["running"] == "b" and list(written["cases"]) == ["a"]

    def test_a_lost_device_ends_the_run(self, tmp_path, monkeypatch):
        session, written = self.session(tmp_path, clock=Clock())
        monkeypatch.setattr(gpu_session, "device_answers", lambda: False)
        self.case(session, "a", "failed", "illegal memory access")
        assert session.pytest_runtest_protocol(SimpleNamespace(nodeid="b")) is True
        session.pytest_sessionfinish()
        assert written["not run"] == {"b": "the device was lost in a"}
        assert not written["summary"]["finished"]


def test_a_run_that_a_case_ended_goes_on_after_it(tmp_path):
    (tmp_path / "conftest.py").write_text(
        textwrap.dedent("""
            from pathlib import Path
            from gpu_session import GpuSession
            def pytest_configure(config):
                config.pluginmanager.register(GpuSession(Path("report.json")))
        """)
    )
    (tmp_path / "test_it.py").write_text(
        textwrap.dedent("""
            import os
            def test_first(): pass
            def test_ends_the_process(): os._exit(3)
            def test_fails(): raise ValueError("an honest failure")
        """)
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    path = os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    runs = [subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True) for _ in range(2)]
    assert [run.returncode for run in runs] == [3, 1], runs[1].stdout + runs[1].stderr
    report = json.loads((tmp_path / "report.json").read_text())
    outcomes = {name.partition("::")[2]: case["outcome"] for name, case in report["cases"].items()}
    assert outcomes == {"test_first": "passed", "test_ends_the_process": "failed", "test_fails": "failed"}
    assert report["summary"]["finished"] and "honest" in report["cases"]["test_it.py::test_fails"]["message"]
    assert report["machine"]["torch"] and "pytest" in report["machine"]["command"]


def test_cases_that_the_time_leaves_are_reported():
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--gpu-seconds=0"]
    run = subprocess.run([*command, HERE / "test_small_matrix.py"], cwd=HERE.parent, capture_output=True, text=True)
    assert run.returncode == 0 and "cases were not run: the time was up" in run.stdout, run.stdout + run.stderr


class Machine:
    """Commands that take as long as they say, or their limit; `name` of each that was started is kept."""

    def __init__(self, takes: dict[str, float], failing: tuple[str, ...] = ()):
        self.clock, self.takes, self.failing = Clock(), takes, failing
        self.started: list[tuple[str, float]] = []

    def __call__(self, command, seconds, environment) -> str:
        name = command[0]
        self.started.append((name, seconds))
        self.clock.now += min(self.takes[name], seconds)
        if self.takes[name] > seconds:
            return f"ended at its limit of {seconds:.0f} s"
        return "exit status 1" if name in self.failing else OK

    def hour(self, seconds: float = 540) -> Hour:
        return Hour(seconds, self, self.clock)


def step(name: str, most: float, least: float = 10, reserve: float = 0, **more) -> Step:
    return Step(name, lambda seconds: [name, str(seconds)], most, least, reserve, **more)


class TestHour:
    def test_limits(self):
        machine = Machine({"build": 100, "tests": 1000, "bench": 1000})
        hour = machine.hour()
        plan = [step("build", 240, reserve=180), step("tests", 240, reserve=130), step("bench", 420, reserve=5)]
        done = [hour.run(one) for one in plan]
        assert machine.started == [("build", 240), ("tests", 240), ("bench", 540 - 100 - 240 - 5)]
        assert [one.passed for one in done] == [True, False, False]

    def test_failures_keep_nothing_from_running(self):
        machine = Machine({"tests": 5, "bench": 5}, failing=("tests",))
        hour = machine.hour()
        done = [hour.run(step(name, 50)) for name in ("tests", "bench")]
        assert [one.status for one in done] == ["exit status 1", OK]

    def test_a_step_without_time_is_named(self):
        machine = Machine({"slow": 95, "late": 5})
        hour = machine.hour(100)
        hour.run(step("slow", 100))
        done = hour.run(step("late", 50))
        assert done.status == NOT_RUN and not done.passed
        assert hour.run(step("late", 50, required=False)).passed
        assert [name for name, _ in machine.started] == ["slow"]

    def test_what_broke_off_is_run_again_in_the_same_time(self):
        machine = Machine({"tests": 40})
        behind = iter([7, 12, 12, 99])  # cases; the third run gets no further than the second
        done = machine.hour().run(step("tests", 200, unfinished=lambda: next(behind)))
        assert machine.started == [("tests", 200), ("tests", 160), ("tests", 120)]
        assert done.seconds == 120

    def test_the_first_failure_is_the_status(self):
        machine = Machine({"tests": 40}, failing=("tests",))
        behind = iter([7, None, None])
        assert machine.hour().run(step("tests", 200, unfinished=lambda: next(behind))).status == "exit status 1"


class TestProcesses:
    def test_statuses(self):
        python = [sys.executable, "-c"]
        assert gpu_hour.execute([*python, "pass"], 60, {}) == OK
        assert gpu_hour.execute([*python, "import os; assert os.environ['GIVEN'] == 'x'"], 60, {"GIVEN": "x"}) == OK
        assert gpu_hour.execute([*python, "raise SystemExit(3)"], 60, {}) == "exit status 3"

    def test_what_is_over_its_limit_ends_with_its_children(self, tmp_path):
        child = "import pathlib, time; time.sleep(3); pathlib.Path('late').touch()"
        parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], cwd={str(tmp_path)!r})"
        assert gpu_hour.execute([sys.executable, "-c", parent], 1, {}) == "ended at its limit of 1 s"
        time.sleep(4)  # by when a child that lived on would have left its file
        assert not (tmp_path / "late").exists()


class TestPlan:
    def test_order_and_room(self, tmp_path):
        plan = gpu_hour.steps(tmp_path)
        assert [one.name for one in plan] == ["build", "tests", "bench gpu", "bench small_matrix"]
        assert plan[1].most <= 240
        worst = Machine({one.name: 1e6 for one in plan})
        hour = worst.hour(gpu_hour.TOTAL_SECONDS)
        for one in plan:  # each takes all that it may, and yet the benchmark is reached in time
            hour.run(step(one.name, one.most, one.least, one.reserve))
        assert [name for name, _ in worst.started][:3] == ["build", "tests", "bench gpu"]
        assert worst.clock.now <= Clock.now + 540

    def test_dry_run(self, capsys):
        assert gpu_hour.main(["--dry-run"]) == 0
        shown = capsys.readouterr().out
        assert "gpu-build" in shown and "-m gpu" in shown and "bench gpu" in shown

    def test_benchmarks_in_order_of_importance(self):
        stages = bench_gpu.stages(quick=False)
        count = len(bench_gpu.SHAPES)
        assert [(one.part, one.shape, one.all_rows) for one in stages[:count]] == [
            ("decode", shape, (1,)) for shape in bench_gpu.SHAPES
        ]
        assert all([peer.name for peer in one.contenders] == ["bf16 linear", "nf4"] for one in stages[:count])
        assert {(s.part, s.shape, m) for s in stages for m in s.all_rows}.issuperset(
            ("decode", shape, m) for shape in bench_gpu.SHAPES for m in bench_gpu.DECODE_ROWS
        )

    def test_a_later_row_replaces_one_that_it_covers(self):
        first = {"part": "decode", "N x K": "8x8", "M": 1, "bf16 linear": 2.0, "nf4": 1.0}
        partial, whole, other = {**first}, {**first, "int4": 1.5}, {**first, "M": 2}
        del partial["nf4"]
        assert bench_gpu.with_row([first, other], whole) == [other, whole]
        assert bench_gpu.with_row([first], partial) == [first, partial]


class TestSummary:
    def results(self, folder: Path) -> None:
        machine = {"cuda_devices": ["a device"], "torch": "2.11", "triton": "3.6", "date": "2026-01-01"}
        cases = {f"test_a.py::f[{i}]": {"outcome": "failed", "message": f"wrong {i}"} for i in range(20)}
        tests = {"failed": 20, "not run": 3, "finished": True, "device lost": None}
        row = {"part": "decode", "N x K": "8x16", "M": 1, "bf16 linear": 6.0, "nf4": 2.0}
        aim = {"target": "nf4 against bf16", "at": "decode 8x16 M=1", "value": 3.0, "aim >=": 3.3, "met": False}
        bench = {"microseconds": [row], "targets": [aim], "not measured": {"gemlite": "ImportError"}}
        for name, found in (("gpu_tests", {"summary": tests, "cases": cases}), ("gpu", bench)):
            (folder / f"{name}.json").write_text(json.dumps({"machine": machine, **found}))

    def test_one_page(self, tmp_path):
        self.results(tmp_path)
        page = gpu_hour.summary([Done(step("tests", 9), "exit status 1", 200.0)], tmp_path)
        for part in (
            "a device",
            "torch 2.11",
            "| tests | exit status 1 | 200 |",
            "failed: 20",
            "not run: 3",
            "wrong 0",
        ):
            assert part in page
        assert "| 8x16, M=1 | 6.0 | 2.0 | 3.00 |" in page and "0 of 1 met" in page and "gemlite" in page
        assert "and 8 more" in page and len(page.splitlines()) <= 60

    def test_of_nothing(self, tmp_path):
        assert "No step left a result file" in gpu_hour.summary([], tmp_path)

    @pytest.mark.parametrize("failing", [(), ("tests",)])
    def test_exit_status_and_files(self, tmp_path, failing, capsys):
        (tmp_path / "gpu.json").write_text("{}")  # of an earlier run
        machine = Machine({"tests": 1, "bench": 1}, failing)
        status = gpu_hour.run([step("tests", 9, 1), step("bench", 9, 1)], tmp_path, machine.hour())
        assert status == bool(failing)
        assert [name for name, _ in machine.started] == ["tests", "bench"]
        assert [path.name for path in tmp_path.iterdir()] == ["gpu_hour.md"]
        assert (tmp_path / "gpu_hour.md").read_text() in capsys.readouterr().out
