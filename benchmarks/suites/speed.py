"""A meta-gradient of fmeta against its peers: agreement first, then alternating blocks of timed calls."""

from __future__ import annotations

import dataclasses
import statistics
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks import harness
from benchmarks.cells import Cell
from benchmarks.contenders import CONTENDERS, Absent, Contender, Setting, difference
from benchmarks.flops import meta_gradient_flops
from benchmarks.one import in_own_process
from benchmarks.options import Options
from benchmarks.problems import Problem, build
from benchmarks.results import Results
from fmeta.types import Params

EXACT, ROUNDED = 1e-6, 1e-1
"""What a meta-gradient may differ from fmeta's by: in float64 on the first tasks; in float32, as it is timed.

The first is the check of the formula. The second is wide, because one ReLU input within rounding of zero
moves the gradient of its task by a jump, in every contender.
"""
CHECKED = {"resnet12": 1}
"""Tasks of the float64 check, where two are too slow."""


@dataclasses.dataclass
class Standing:
    """What is known of a contender in a cell."""

    name: str
    status: str = "timed"
    contender: Contender | None = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    blocks: list[list[float]] = dataclasses.field(default_factory=list)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """A failure inside becomes the contender's status, which ends its part."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except Absent as error:
            self.status = f"absent: {error}"
        except harness.OverTime as error:
            self.status = str(error)
        except Exception as error:
            self.status = f"refused: {harness.first_line(error)}"
        if self.status != "timed" and self.contender is not None:
            self.contender.close()
            self.contender = None


def run(options: Options, results: Results) -> None:
    """All cells."""
    for cell in options.cells():
        if not results.has("speed", cell.name):
            race(cell, options, results)


def race(cell: Cell, options: Options, results: Results) -> None:
    """One cell: check, time, measure memory, record."""
    problem, setting = build(cell, options.device), options.setting()
    standings = [Standing(name) for name in ("fmeta", *options.peers)]
    ours = None
    try:
        for standing in standings:
            with standing.guarded():
                ours = enter(standing, problem, setting, ours)
        peaks = [interleave(standings, i, options) for i in range(options.rounds)]
    finally:
        for standing in standings:
            if standing.contender is not None:
                standing.contender.close()
    flops = meta_gradient_flops(problem)
    for standing in standings:
        facts = {**standing.facts, **summary(standing, standings[0], cell.tasks, flops, peaks)}
        if options.memory and standing.blocks:
            facts |= peak(standing, cell, setting)
        config = {
            **cell.config(),
            "rounds": options.rounds,
            "seconds": options.seconds,
            "limit": options.limit,
        }
        results.add("speed", cell.name, standing.name, config, facts, standing.status)


def enter(
    standing: Standing, problem: Problem, setting: Setting, ours: tuple[Params, Params] | None
) -> tuple[Params, Params]:
    """Start a contender and check it against fmeta; returns fmeta's gradients, float64 and float32."""
    spec = CONTENDERS[standing.name]
    if ours is None and standing.name != "fmeta":
        raise RuntimeError("fmeta did not run, so there is nothing to agree with")
    contender = standing.contender = spec.start(problem, setting)
    standing.facts.update(getattr(contender, "facts", {}))
    count = min(problem.cell.tasks, CHECKED.get(problem.cell.net, 2))
    exact = None if spec.is_step else contender.exact(count)
    standing.facts["first_s"], grads = contender.first()
    if ours is None:
        assert exact is not None
        return exact, grads
    if exact is not None:
        errors = difference(exact, ours[0]), difference(grads, ours[1])
        standing.facts |= {"error_float64": errors[0], "error_float32": errors[1]}
        if not (errors[0] <= EXACT and errors[1] <= ROUNDED):
            standing.status = (
                f"disagrees: relative difference {errors[0]:.1e} in float64, {errors[1]:.1e} in float32"
            )
    return ours


def interleave(standings: list[Standing], i: int, options: Options) -> float:
    """One block: the matmul rate, then each contender once, every other block in reverse order."""
    rate = harness.matmul_gflops(options.device)
    running = [s for s in standings if s.contender is not None]
    for standing in running if i % 2 == 0 else running[::-1]:
        with standing.guarded():
            assert standing.contender is not None
            standing.blocks.append(standing.contender.times(options.seconds, options.calls))
    return rate


def summary(standing: Standing, ours: Standing, tasks: int, flops: int, peaks: list[float]) -> dict[str, Any]:
    """Figures of all blocks together; ratios are taken inside a block."""
    if not standing.blocks:
        return {}
    calls = [ms for block in standing.blocks for ms in block]
    median = statistics.median(calls)
    medians = [statistics.median(block) for block in standing.blocks]
    pairs = zip(medians, (statistics.median(block) for block in ours.blocks), strict=False)
    ratios = [theirs / mine for theirs, mine in pairs]
    share = [flops / (ms * 1e6) / peak for ms, peak in zip(medians, peaks, strict=False)]
    return {
        "ms": harness.spread(calls),
        "calls": len(calls),
        "block_ms": medians,
        "tasks_per_s": 1e3 * tasks / median,
        "ratio": harness.spread(ratios) if ratios else None,
        "gflop": flops / 1e9,
        "matmul_gflops": peaks,
        "share_of_matmul": harness.spread(share),
    }


def peak(standing: Standing, cell: Cell, setting: Setting) -> dict[str, Any]:
    """Peak memory of a warm call in a process of its own, or why it is not known."""
    try:
        limit = setting.compile_limit + 3 * setting.limit
        return in_own_process("peak", limit, cell=cell.config(), who=standing.name, setting=list(setting))
    except RuntimeError as error:
        return {"no_peak": str(error)}


def job(cell: dict[str, Any], who: str, setting: list[Any]) -> dict[str, float]:
    """Peak memory of a contender, in this process."""
    known = Setting(*setting)
    contender = CONTENDERS[who].start(build(Cell(**cell), known.device), known)
    try:
        return contender.peak()
    finally:
        contender.close()
