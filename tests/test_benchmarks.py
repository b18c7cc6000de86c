"""The benchmark suite: peers agree with fmeta in float64, flops are counted, a report is made from stored lines."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import __main__ as command
from benchmarks import approaches, caltech_table, harness, one, report
from benchmarks.cells import CELLS, TINY, Cell, chosen, named
from benchmarks.contenders import CONTENDERS, PEERS, difference
from benchmarks.flops import meta_gradient_flops
from benchmarks.options import Options
from benchmarks.peers.base import Absent, Setting
from benchmarks.problems import Problem, build
from benchmarks.results import Results, read
from benchmarks.suites import scaling, speed
from fmeta.train import cli, options
from fmeta.train.choices import EMBEDDINGS, WEIGHTS
from fmeta.types import Batch, Task

SMALL = {
    "mlp": Cell("mlp", "mlp", 3, 2, shots=5, queries=4, channels=8),
    "conv4": Cell("conv4", "conv4", 2, 1, 3, 2, 2, 0.1, channels=4, size=16),
    "transformer": Cell("transformer", "transformer", 2, 2, 3, 2, 1, 0.1, channels=8, size=3),
    "torchbench": Cell("torchbench", "torchbench", 2, 1, 3, 2, 1, 0.1, channels=4),
}
LOCAL = [name for name in PEERS if not CONTENDERS[name].form and not CONTENDERS[name].is_step]


@pytest.fixture(autouse=True)
def without_warnings() -> Iterator[None]:
    """Peers are old enough to warn about themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def start(name: str, cell: Cell) -> Any:
    try:
        return CONTENDERS[name].start(build(cell), Setting())
    except Absent as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("net", SMALL)
@pytest.mark.parametrize("name", LOCAL)
def test_peers_have_fmetas_meta_gradient(name: str, net: str) -> None:
    cell = SMALL[net]
    want = start("fmeta", cell).exact(cell.tasks)
    got = start(name, cell).exact(cell.tasks)
    assert difference(got, want) < 1e-9
    assert difference(got, {k: 2 * v for k, v in want.items()}) > 0.4


@pytest.mark.parametrize(("net", "name"), [("mlp", "jax-scan"), ("conv4", "jax")])
def test_jax_has_fmetas_meta_gradient_and_times_itself(net: str, name: str) -> None:
    """Two networks, for compiling takes long; every run of the speed suite checks all it times."""
    cell = SMALL[net]
    contender = start(name, cell)
    try:
        assert difference(contender.exact(cell.tasks), start("fmeta", cell).exact(cell.tasks)) < 1e-9
        if net == "mlp":
            seconds, grads = contender.first()
            assert seconds > 0
            assert all(g.dtype == torch.float32 for g in grads.values())
            assert 1 <= len(contender.times(0.01, 3)) <= 3
    finally:
        contender.close()


def test_a_wrong_peer_is_reported_and_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A contender with another gradient, one that refuses, one that is absent: each is said, none is timed."""
    wrong = lambda problem: lambda: {k: p * 0 + 1 for k, p in problem.params.items()}  # noqa: E731

    def refuses(problem: Problem) -> Any:
        raise NotImplementedError("no such layer")

    spec = CONTENDERS["loop"]
    monkeypatch.setitem(CONTENDERS, "fmeta", CONTENDERS["fmeta"]._replace(make=CONTENDERS["vmap"].make))
    monkeypatch.setitem(CONTENDERS, "wrong", spec._replace(make=wrong, exact=wrong))
    monkeypatch.setitem(CONTENDERS, "refuses", spec._replace(make=refuses, exact=refuses))
    monkeypatch.setitem(CONTENDERS, "absent", spec._replace(package="no_such_package"))
    options = Options(
        peers=("loop", "wrong", "refuses", "absent"),  # type: ignore[arg-type]
        rounds=2, seconds=0.01, calls=2, memory=False,
    )  # fmt: skip
    speed.race(SMALL["mlp"], options, Results(tmp_path))
    rows = {row.who: row for row in read(tmp_path)}
    assert rows["loop"].status == rows["fmeta"].status == "timed"
    assert len(rows["loop"].result["block_ms"]) == 2
    assert rows["loop"].result["ratio"]["min"] <= rows["loop"].result["ratio"]["max"]
    for who, said in (("wrong", "disagrees"), ("refuses", "no such layer"), ("absent", "no_such_package")):
        assert said in rows[who].status
        assert "ms" not in rows[who].result
    text = report.write(tmp_path).read_text()
    assert "disagrees" in text and "Nothing here ran on a GPU" in text


def test_flops_of_a_matrix_product() -> None:
    """One linear layer without bias: support, its gradient and twice as much for the second derivative."""
    inputs, outputs, shots, queries, tasks = 5, 3, 4, 7, 2
    batch = lambda n: Batch(torch.randn(tasks, n, inputs), torch.randn(tasks, n, outputs))  # noqa: E731
    cell = Cell("linear", "mlp", tasks, 1, lr=0.1)
    net = nn.Linear(inputs, outputs, bias=False)
    problem = Problem(cell, net, Task(batch(shots), batch(queries)), nn.functional.mse_loss)
    one_task = 4 * 2 * shots * inputs * outputs + 2 * 2 * queries * inputs * outputs
    assert meta_gradient_flops(problem) == tasks * one_task


def line(suite: str, cell: str, who: str, config: dict, result: dict, status: str = "timed") -> str:
    run = {
        "time": "2026-01-02T03:04:05Z", "commit": "abc", "device": "cpu 2 cores", "processor": "a processor",
        "threads": 2, "load": 0.1, "python": "3.11", "versions": {"torch": "2.14.1", "higher": ""},
    }  # fmt: skip
    row = {"suite": suite, "cell": cell, "who": who, "status": status, "config": config, "result": result}
    return json.dumps({**row, "run": run})


def test_a_report_is_made_again_from_its_lines(tmp_path: Path) -> None:
    spread = {"median": 2.0, "min": 1.0, "max": 3.0}
    speeds = {"ms": spread, "ratio": spread, "tasks_per_s": 5.0, "share_of_matmul": spread, "calls": 3}
    sine = {(t, s): Cell("", "mlp", t, s).config() for t, s in ((100, 1), (100, 10), (25, 10))}
    one_step, five = SMALL["conv4"].config(), SMALL["conv4"].smaller(steps=5).config()
    compiling = {"cold_seconds": 9.0, "cold_cpu_seconds": 11.0, "warm_seconds": 1.5}
    lines = [
        *(line("speed", f"sinusoid-{t}x{s}", "fmeta", config, speeds) for (t, s), config in sine.items()),
        line("speed", "sinusoid-100x10", "higher", sine[100, 10], {}, "over the limit of 60 s a call"),
        line("memory", "conv4-1steps", "nested", one_step, {"mib": 1.0, "seconds": 1.0}),
        line("memory", "conv4-5steps", "nested", five, {"mib": 7.0, "seconds": 1.0}),
        line("memory", "conv4-5steps", "nested", five, {"mib": 8.5, "seconds": 1.0}),
        line("compile", "sinusoid-25x1", "fmeta", {}, compiling),
        line("scaling", "sinusoid-100x5", "chunks", {"chunk_size": 100}, {"ms_a_task": 0.1, "mib": 3.0}),
        line("ranks", "sinusoid-100x5", "2 ranks", {}, {"ms": 1.0, "ratio": [0.6], "error": 1e-7}),
        line("norms", "MLP", "fmeta", {}, {"error": 1e-16}, "measured"),
    ]
    (tmp_path / "results.jsonl").write_text("\n".join(lines) + "\n")
    assert command.main(["--suite", "report", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    for expected in (
        "2 (1 to 3)",
        "over the limit of 60 s",
        "8.5 (1 s)",
        "9 (11) / 1.5",
        "x 0.6",
        "1.0e-16",
        "## Not claimed",
    ):
        assert expected in text
    assert "7 (1 s)" not in text  # measured again later
    pictures = ("time_vs_tasks.png", "time_vs_steps.png", "memory_vs_steps.png")
    assert all((tmp_path / name).stat().st_size > 1000 for name in pictures)


def test_an_empty_run_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="report: results were expected"):
        report.write(tmp_path)
    with pytest.raises(SystemExit, match="needs a run folder"):
        command.main(["--suite", "report"])


def test_a_resumed_run_skips_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text(line("speed", "conv4-tiny", "fmeta", {}, {}) + "\n")
    assert Results(tmp_path, resume=True).has("speed", "conv4-tiny")
    assert not Results(tmp_path, resume=True).has("speed", "sinusoid-5x1")
    assert not Results(tmp_path).has("speed", "conv4-tiny")


def test_cells_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    names = [cell.name for cell in (*CELLS, *TINY)]
    assert len(names) == len(set(names))
    assert chosen("conv4-tiny", ("sinusoid", "conv4*y")) and not chosen("conv4-tiny", ("conv4", "sinusoid*"))
    with pytest.raises(ValueError, match="named: a cell was expected"):
        named("no-such-cell")
    assert command.main(["--suite", "all", "--list", "--only", "*-100x5*"]) == 0
    assert set(capsys.readouterr().out.split()) >= {"speed", "sinusoid-100x5", "sinusoid-100x50", "scaling"}


def test_help_names_every_option() -> None:
    root = Path(__file__).parent.parent
    shown = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--help"], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    for option in (
        "--suite",
        "--device",
        "--peers",
        "--quick",
        "--only",
        "--jax-python",
        "--resume",
        "torchopt",
    ):
        assert option in shown


def test_a_slow_call_is_stopped() -> None:
    with pytest.raises(harness.OverTime, match="over the limit"), harness.limit(0.05):
        while True:
            pass


def test_blocks_take_one_slow_call_or_many_quick_ones() -> None:
    assert len(harness.block(lambda: None, 0.5, 4)) == 4
    assert len(harness.block(lambda: sum(range(200_000)), 0.0, 4)) == 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be reset on Linux only")
def test_peak_memory_sees_what_a_call_holds() -> None:
    """In a process of its own, as benchmarks measure: one that has freed much gives that out again."""
    if not harness.forget_peak():
        pytest.skip("this system does not let a process reset its peak")
    code = (
        "import torch; from benchmarks import harness as h\n"
        "before = h.resident_mib()\n"
        "print(h.added_mib(before, lambda: torch.ones(64, 2**18).sum()))"  # 64 MiB
    )
    root = Path(__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert 50 < float(found.stdout) < 100


def test_a_job_that_fails_in_its_process_says_why() -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'no_such_way'"):
        one.in_own_process("peak", cell=SMALL["mlp"].config(), who="no_such_way", setting=list(Setting()))


def test_gradients_of_other_weights_are_not_compared() -> None:
    with pytest.raises(RuntimeError, match="difference: gradients of the same weights"):
        difference({"a": torch.ones(1)}, {"b": torch.ones(1)})


def test_the_scaling_job_measures() -> None:
    found = scaling.job(SMALL["mlp"].smaller(tasks=4).config(), 2, "cpu", 0.01, 2, eager=True)
    assert found["ms_a_task"] > 0 and found["calls"] >= 1


def test_jax_is_absent_without_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMETA_BENCH_JAX", str(Path("/no/such/python")))
    with pytest.raises(Absent, match="no/such/python"):
        CONTENDERS["jax"].start(build(SMALL["mlp"]), Setting())


class Called:
    """A stand-in for the command line: what it is told to train, as the configs that the real one makes of it."""

    def __init__(self) -> None:
        self.trained: list[Any] = []
        self.compared: list[str] = []
        self.compares: list[list[str]] = []

    def __call__(self, words: list[str]) -> int:
        if words[0] == "compare":
            self.compared = words
            self.compares.append(words)
            return 0
        config = cli.parse(cli.resume_spelled_out(words)).config
        options.check(config)
        config.out.mkdir(parents=True)
        (config.out / "results.json").write_text("{}")
        self.trained.append(config)
        return 0


def test_four_approaches_differ_in_what_they_learn_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = Called()
    monkeypatch.setattr(approaches, "fmeta", called)
    monkeypatch.setattr(sys, "argv", ["approaches", "--out", str(tmp_path), "--inner-steps", "4"])
    for _ in range(2):  # the second time nothing is trained again
        with pytest.raises(SystemExit) as ended:
            approaches.main()
        assert ended.value.code == 0
    assert [(c.inner.algorithm, c.task.labels) for c in called.trained] == [
        ("maml", True),
        ("maml", False),
        ("learned", True),
    ]
    for config in called.trained:
        assert (config.inner.inner_steps, config.inner.test_steps, config.outer.outer_steps) == (4, 4, 2_000)
        assert (config.task.shots, config.task.test_queries, config.task.channels) == (1, 5, 32)
    assert called.compared[1:5] == [*(str(tmp_path / name) for name in approaches.APPROACHES), "--baselines"]
    assert "1,4" in called.compared


def test_the_caltech_table_has_every_algorithm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index.csv").write_text(
        "file,label,split\n" + "".join(f"{i}.png,c{i},{'train' if i < 10 else 'test'}\n" for i in range(14))
    )
    called = Called()
    monkeypatch.setattr(caltech_table, "fmeta", called)
    words = [
        "caltech_table",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
        "--shots",
        "5",
        "--minutes",
        "0.5",
    ]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        caltech_table.main()
    assert ended.value.code == 0
    first, timed = called.trained[::2], called.trained[1::2]
    for warm, config in zip(first, timed, strict=True):  # of the same kernels
        outer = replace(config.outer, outer_steps=1)
        assert replace(config, outer=outer, out=warm.out) == warm and config.outer.outer_steps == 100_000
    made = [config.inner.algorithm for config in timed]
    assert set(made) == set(WEIGHTS | EMBEDDINGS) - {"cavia"}, "cavia's model is the sinusoid recipe's"
    assert {(c.stop.minutes, c.task.shots, c.task.network) for c in called.trained} == {(0.5, 5, "conv4")}
    split = {row["label"]: row["split"] for row in csv.DictReader((tmp_path / "out" / "index.csv").open())}
    assert [label for label, part in split.items() if part == "val"] == ["c0", "c5"]
    assert sum(part == "test" for part in split.values()) == 4
    runs = [str(tmp_path / "out" / f"{name}_5") for name in made]
    assert called.compares[0][1:18] == runs and called.compares[1][1:4] == [*runs[:2], "--baselines"]
