"""What a meta-gradient does under a plan, and what it costs: one call watched, a few timed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fmeta import tree
from fmeta.parallel.boundary import check_meta, check_tasks, inside_transform
from fmeta.parallel.cost import Cost, Operation, flops_of, moved_by, peak_of, recorded_operations
from fmeta.parallel.mode import Mode
from fmeta.parallel.program import FlatKernel
from fmeta.parallel.tune import carries_kept, median_seconds
from fmeta.parallel.watch import Observed, Watch
from fmeta.types import InnerLoop, Plan, TaskBatch, Tree


class KernelCost(NamedTuple):
    """One kernel of a meta-gradient, for tasks of some shapes: all numbers but ``calls`` are of one call."""

    name: str
    calls: int
    seconds: float  # median
    flops: int
    moved: int  # bytes in and out
    peak: int  # bytes beside its inputs


@dataclass(frozen=True)
class Explanation:
    """What ``fmeta.explain`` returns.

    Attributes:
        engine: the plan's engine.
        mapped: the plan's way over tasks, ``"vmap"`` or ``"loop"``.
        compiled: whether kernels run.
        compiler: who made them: ``"fmeta"``, ``"inductor"`` or both; empty where nobody did.
        why: why not; empty where they do.
        chunk_size: tasks side by side.
        chunks: how many parts the tasks of this rank are run in.
        choice: how ``chunk_size="auto"`` was decided; empty otherwise.
        remat: the plan's block length.
        carries: carries that the adjoint engine keeps for its backward loop.
        carry_bytes: size of one (parameters and inner state of the tasks of one chunk).
        ranks: processes that share the tasks.
        kernels: each kernel and shape.
        seconds: of one meta-gradient, median; a replayed one where calls are replayed.
        compile_seconds: spent compiling, for all sizes that were tried.
        flops: of the products and convolutions in one meta-gradient.
        moved: bytes that go in and out of its kernels, or uncompiled of its operations.
        peak: bytes predicted to be alive at once, beside meta and tasks.
        operations: calls of torch outside of kernels.
    """

    engine: str
    mapped: str
    compiled: bool
    compiler: str
    why: str
    chunk_size: int
    chunks: int
    choice: str
    remat: int | None
    carries: int
    carry_bytes: int
    ranks: int
    kernels: tuple[KernelCost, ...]
    seconds: float
    compile_seconds: float
    flops: int
    moved: int
    peak: int
    operations: int

    def __str__(self) -> str:
        """A table."""
        kept = f"{count(self.carries, 'carry')} kept, {size(self.carry_bytes)} each"
        done = f"yes, by {self.compiler} in {self.compile_seconds:.1f} s"
        rows = {
            "engine": f"{self.engine}, tasks by {self.mapped}",
            "compiled": done if self.compiled else f"no: {self.why}",
            "chunks": f"{self.chunks} of {count(self.chunk_size, 'task')}"
            + (f": {self.choice}" if self.choice else ""),
            "remat": f"{'none' if self.remat is None else f'blocks of {self.remat} steps'}: {kept}",
            "ranks": str(self.ranks),
            "time": f"{1000 * self.seconds:.3f} ms a meta-gradient",
            "flops": f"{amount(self.flops)}FLOP, {amount(self.flops / max(self.seconds, 1e-9))}FLOP/s",
            "bytes moved": size(self.moved),
            "peak memory": f"{size(self.peak)} predicted, beside meta and tasks",
            "operations": f"{self.operations} outside of kernels",
        }
        if self.engine != "adjoint":
            del rows["remat"]
        lines = [f"{name:<15}{value}" for name, value in rows.items()]
        return "\n".join([*lines, *([""] if self.kernels else []), *self.table()])

    def table(self) -> list[str]:
        """A line for each kernel."""
        if not self.kernels:
            return []
        head = f"{'kernel':<17}{'calls':>6}{'ms a call':>12}{'flops':>12}{'bytes':>12}{'peak':>12}"
        return [head] + [
            f"{k.name:<17}{k.calls:>6}{1000 * k.seconds:>12.3f}{amount(k.flops):>12}"
            f"{size(k.moved):>12}{size(k.peak):>12}"
            for k in self.kernels
        ]


def count(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number} {noun if number == 1 else noun.removesuffix('y') + ('ies' if noun[-1] == 'y' else 's')}"


def amount(number: float) -> str:
    """A number with a decimal prefix."""
    for prefix, power in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= power:
            return f"{number / power:.2f} {prefix}"
    return f"{number:.0f} "


def size(number: int) -> str:
    """A number of bytes."""
    for unit, power in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= power:
            return f"{number / power:.2f} {unit}"
    return f"{number} B"


def explain_loop(loop: InnerLoop, plan: Plan, meta: Tree, tasks: TaskBatch) -> Explanation:
    """What a meta-gradient of a loop does and costs; see ``fmeta.explain``."""
    check_meta("explain", meta, learns=True)
    check_tasks("explain", tasks, plan)
    if inside_transform(meta, tasks):
        raise ValueError(
            "explain: expected a plain call, got one inside of the caller's own grad, vmap or torch.compile. "
            "Call it outside, with meta detached."
        )
    runner = Observed(loop, plan)
    call = runner.replayed("explain", lambda meta, tasks: runner.gradient("explain", meta, tasks))
    flat, spec = tree.flatten((meta, tasks))
    distinct = [x.detach() for x in flat]  # one tensor may be passed twice
    with torch.random.fork_rng():
        call(meta, tasks)
        call(meta, tasks)  # recorded, where calls are replayed
        seconds = median_seconds(lambda: call(meta, tasks), runner.ranks.agree, tree.device(meta))
        runner.sizes.clear()
        watch = Watch(distinct)
        with watch:
            result = runner.gradient("explain", *tree.unflatten(distinct, spec))
        return described(runner, watch, meta, result, seconds)


def described(runner: Observed, watch: Watch, meta: Tree, result: Any, seconds: float) -> Explanation:
    """The record of a watched call."""
    plan, loop = runner.plan, runner.loop
    built = runner.built_kernels()
    costs = {run: cost for run, (_, cost) in built.items()}
    like = dict(enumerate(watch.like))
    operations = list(recorded_operations(watch.instructions, costs))
    results = tuple(watch.registers[leaf] for leaf in tree.leaves(result))
    _, mode, _ = runner.last or (None, Mode(plan, False, False), None)
    refused = next((kernel.why for kernel in runner.kernels.values() if kernel.why), "")
    choice = next(iter(runner.choices.values()), "")
    makers = {one.maker for kernel in runner.kernels.values() for one in kernel.compiled.values() if one}
    return Explanation(
        engine=plan.engine,
        mapped=plan.tasks,
        compiled=any(one.inside for one in operations),
        compiler=" and ".join(sorted(makers)),
        why=mode.why or refused,
        chunk_size=max(runner.sizes),
        chunks=len(runner.sizes) // (2 if loop.outer_radius else 1),  # the same tasks again, uphill
        choice=str(choice),
        remat=plan.remat,
        carries=carries_kept(loop, plan) if plan.engine == "adjoint" else 0,
        carry_bytes=runner.carry_bytes(meta),
        ranks=runner.ranks.size,
        kernels=tuple(kernel_costs(operations, watch, built)),
        seconds=seconds,
        compile_seconds=sum(kernel.compile_seconds for kernel in runner.kernels.values()),
        flops=flops_of(operations, like),
        moved=moved_by(operations, like),
        # Python holds on to what a replayed call frees at its last use
        peak=peak_of(operations, like, results) if any(one.inside for one in operations) else watch.peak,
        operations=sum(one.call not in watch.seconds for one in operations),
    )


def kernel_costs(
    operations: list[Operation], watch: Watch, built: dict[FlatKernel, tuple[str, Cost]]
) -> Iterator[KernelCost]:
    """A line for each kernel that ran, in the order of their first calls."""
    for run, taken in watch.seconds.items():
        calls = [one for one in operations if one.call == run]
        name, cost = built.get(run, ("all_reduce", Cost(0, 0, 0)))
        if run not in built:  # the sum over ranks
            cost = Cost(0, moved_by(calls[:1], dict(enumerate(watch.like))), 0)
        yield KernelCost(name, len(calls), statistics.median(taken), *cost)
