"""Carries out a plan: which engine, compiled or not, in which chunks. The only place that decides it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from fmeta import tree
from fmeta.functional import differentiable
from fmeta.parallel.adjoint import MetaGradient, Report, adjoint_engine, curve
from fmeta.parallel.boundary import (
    check_engine,
    check_meta,
    check_tasks,
    inside_transform,
    signature,
    translated,
)
from fmeta.parallel.cuda import graphed
from fmeta.parallel.derivatives import load_forward_mode
from fmeta.parallel.inspect import Found, inspect
from fmeta.parallel.kernels import Kernel, warn_once
from fmeta.parallel.mesh import Share, ranks_of
from fmeta.parallel.mode import Mode, is_small, out_of_memory, reseeded, surroundings
from fmeta.parallel.native.axis import Axes
from fmeta.parallel.precision import lowered
from fmeta.parallel.program import Recorder
from fmeta.parallel.reference import autograd_curve, autograd_engine, nested_engine
from fmeta.parallel.replay import Replay, replaying
from fmeta.parallel.steps import KERNELS, Steps
from fmeta.parallel.store import key_of
from fmeta.parallel.traits import Traits, probe
from fmeta.parallel.tune import Choice, choose, in_chunks, start_size, tuned
from fmeta.types import InnerLoop, Metrics, Plan, Task, TaskBatch, Tree
from fmeta.uphill import uphill

Build = Callable[[InnerLoop, Mode], Callable[..., Any]]


class Runner:
    """An inner loop under a plan; remembers kernels and what was found out about the loop."""

    def __init__(self, loop: InnerLoop, plan: Plan, shaped: bool = False) -> None:
        """Nothing is looked at before the first call. ``shaped``: metrics of a task need not be single numbers."""
        load_forward_mode()
        self.loop, self.plan, self.ranks = lowered(loop, plan.precision), plan, ranks_of(plan.mesh)
        self.shaped = shaped
        self.looked_at: dict[Any, Found] = {}
        self.traits: Traits | None = None
        self.built: dict[Any, Any] = {}
        self.kernels: dict[str, Kernel] = {}
        self.chunk = None if plan.chunk_size == "auto" else plan.chunk_size
        self.choices: dict[Any, Choice] = {}
        self.climb = self.once("uphill", partial(uphill, radius=loop.outer_radius))

    def replayed(self, call: str, fn: Callable[..., Any]) -> Replay:
        """A whole call, replayed where it is made of kernels."""
        plan = self.plan
        compiled = plan.engine == "adjoint" and plan.tasks == "vmap" and plan.compile is not False
        wanted = compiled and plan.randomness == "error"
        return Replay(fn, wanted, partial(replaying, call, plan.precision), graphed)

    def kernel(self, name: str, fn: Callable[..., Any], axes: Axes | None = None) -> Kernel:
        """A compiled form of a function of tensors, whose arguments have the tasks in these dimensions."""
        return self.kernels.setdefault(name, Kernel(name, fn, self.plan, axes))

    def look(self, call: str, meta: Tree, tasks: Task, training: bool) -> Mode:
        """Inspect the loss once for every combination of shapes, and decide how to run."""
        check_engine(call, self.plan)
        inside = inside_transform(meta, tasks)
        if torch.compiler.is_compiling():
            return Mode(self.plan, True, False)
        found = Found(random=self.plan.randomness != "error", captures=True)
        if torch._C._functorch.peek_interpreter_stack() is None:
            key = (torch.is_grad_enabled(), signature(meta, tasks))
            if key not in self.looked_at:
                self.looked_at[key] = inspect(call, self.loop, self.plan, meta, tasks, self.shaped)
            found = self.looked_at[key]
        if self.traits is None and self.plan.engine != "autograd":
            with torch.set_grad_enabled(inside), differentiable(), torch.random.fork_rng():
                k = torch.zeros((), dtype=torch.int64, device=tree.device(meta, tasks))
                self.traits = probe(self.loop, meta, tree.select(tasks, 0), k)
        flops = found.flops * tree.leaves(tasks)[0].shape[0]
        small = is_small(self.plan, tree.device(meta), flops)
        return Mode(self.plan, inside or found.captures, found.random, training, small)

    def steps(self, loop: InnerLoop, compiled: bool) -> Any:
        """The pieces of a meta-gradient, as kernels where compiled."""
        steps = Steps(loop, self.traits or Traits(), self.plan.randomness)
        made = {n: self.kernel(n, getattr(steps, n), axes) for n, axes in KERNELS.items() if compiled}
        return SimpleNamespace(**made) if compiled else steps

    def engine(self, loop: InnerLoop, mode: Mode) -> MetaGradient:
        """The meta-gradient of one chunk."""
        plan = self.plan
        if plan.engine == "autograd":
            return autograd_engine(loop, mode.inside)
        # dynamo 2.14 cannot trace forward mode under vmap ("device mismatch meta/cpu", pytorch 151196), so inside
        # a caller's own torch.compile the definition runs: the same numbers, compiled by the caller.
        if plan.engine == "nested" or torch.compiler.is_compiling():
            engine = nested_engine(loop, plan.randomness)
            return self.kernel("nested", engine, (None, 0)) if mode.compiled else engine
        traits, merged = self.traits or Traits(), mode.merges(loop)
        engine = adjoint_engine(loop, self.steps(loop, mode.compiled and not merged), traits, plan.remat)
        return self.kernel("whole", engine, (None, 0)) if merged else engine

    def evaluator(self, at: tuple[int, ...], loop: InnerLoop, mode: Mode) -> Callable[[Tree, Task], Metrics]:
        """Metrics of one chunk after each number of updates."""
        if self.plan.engine == "autograd":
            return autograd_curve(loop, list(at), mode.inside)
        return curve(loop, self.steps(loop, mode.compiled), list(at))

    def once(self, name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        """A function that runs once an outer step, after the tasks: compiled as they are."""

        captures: list[bool] = []

        def call(*args: Any) -> Any:
            inside = inside_transform(args)
            if not inside and torch.is_grad_enabled():
                captures[:] = captures or [any(x.requires_grad for x in tree.leaves(fn(*args)))]
                inside = captures[0]
            mode = Mode(self.plan, inside, random=False)
            with surroundings(mode):
                return (self.kernel(name, fn) if mode.compiled else fn)(*args)

        return call

    def gradient(self, call: str, meta: Tree, tasks: TaskBatch) -> tuple[Tree, Report]:
        """Mean meta-gradient and the report of all tasks; taken uphill of meta where the loop has a radius."""
        grads, (metrics, ok) = self.gradient_at(call, meta, tasks)
        if self.loop.outer_radius:
            grads, (_, above) = self.gradient_at(call, self.climb(meta, grads), tasks)
            ok = ok & above
        return grads, (metrics, ok)

    def gradient_at(self, call: str, meta: Tree, tasks: TaskBatch) -> tuple[Tree, Report]:
        """The same, of meta itself."""
        share, parts = self.over_chunks(call, meta, tasks, self.engine, training=True)
        if self.plan.mesh is None and len(parts) == 1:
            return parts[0][1]
        grads = share.mean([(count, part) for count, (part, _) in parts])
        reports = [report for _, (_, report) in parts]
        metrics = {name: torch.cat([r[0][name] for r in reports]) for name in reports[0][0]}
        grads, (metrics, ok) = self.ranks.join(share, grads, (metrics, torch.cat([r[1].mT for r in reports])))
        return grads, (metrics, ok.mT)

    def metrics(self, call: str, meta: Tree, tasks: TaskBatch, at: tuple[int, ...]) -> Metrics:
        """Metrics ``[task, len(at), ...]`` of all tasks."""
        make = partial(self.evaluator, at)
        share, found = self.over_chunks(call, meta, tasks, make, training=False)
        parts = [part for _, part in found]
        return self.ranks.join(share, (), {name: torch.cat([p[name] for p in parts]) for name in parts[0]})[1]

    def over_chunks(
        self, call: str, meta: Tree, tasks: TaskBatch, make: Build, training: bool
    ) -> tuple[Share, list[tuple[int, Any]]]:
        """Run ``make(loop, mode)`` on every chunk of this rank's tasks: ``[(tasks in the chunk, result), ...]``."""
        check_meta(call, meta, training)
        self.ranks.check_device(call, meta)
        batches, mapped = check_tasks(call, tasks, self.plan), self.plan.tasks == "vmap"
        total = tree.leaves(batches[0])[0].shape[0] if mapped else len(batches)
        # A chunk that draws its masks together is never parted, whatever the number of ranks.
        unit = (self.chunk or total) if mapped and self.plan.randomness == "different" else 1
        share, seed = self.ranks.share(total, unit), 0
        if self.plan.randomness != "error" and not torch.compiler.is_compiling():
            seed = self.ranks.agree(int(torch.randint(2**62, ())))
        numbered = [(share.begin // unit, batches[0])] if mapped else list(enumerate(batches))[share.rows]
        results = []
        with translated(call):
            for first, batch in numbered:
                # at all tasks, so that every rank finds what is wrong
                mode = self.look(call, meta, batch, training)
                self.ranks.check_outside(call, mode.inside)
                own = tree.map(lambda leaf: leaf[share.rows], batch) if mapped and self.plan.mesh else batch
                run = partial(self.over_chunks_of, own, make, mode, meta, seed, first)
                with surroundings(mode):
                    tunes = self.plan.chunk_size == "auto" and training and mapped and mode.compiled
                    results += self.in_best_chunks(run, share, meta, batch) if tunes else run()
        return share, results

    def in_best_chunks(self, run: Any, share: Share, meta: Tree, batch: Task) -> list[tuple[int, Any]]:
        """``run()`` with the chunk size that is best for such tasks, found out at the first call."""
        shapes = signature(meta, batch)
        if shapes not in self.choices and Recorder.active is None:
            loop, device, total = self.loop, tree.device(meta), -(-share.total // self.ranks.size)
            found = self.looked_at.get((True, shapes)) or self.looked_at[False, shapes]

            def attempt(size: int) -> int:
                self.chunk = size
                run()
                return self.chunk

            def make() -> Choice:
                start = start_size(loop, self.plan, meta, total, found.bytes)
                return choose(attempt, total, self.ranks.agree(start), self.ranks.agree, device)

            about = (shapes, *loop[4:], found.flops, found.bytes)  # all of the loop that is data
            key = key_of(*about, self.plan.engine, self.plan.remat, self.ranks.size, device=device)
            self.choices[shapes] = tuned(key, self.ranks.agree, make)
        if shapes not in self.choices:
            return run()
        choice = self.choices[shapes]
        self.chunk = choice.size
        results = run()
        if self.chunk != choice.size:
            self.choices[shapes] = choice._replace(size=self.chunk, why="memory ran out with more")
        return results

    def over_chunks_of(
        self, batch: Task, make: Any, mode: Mode, meta: Tree, seed: int, first: int
    ) -> list[tuple[int, Any]]:
        """The chunks of one stacked batch, the first of which has the number ``first`` in the whole; with
        ``chunk_size="auto"`` halves them when memory runs out, on the rank where it does: sizes change nothing.
        """
        while True:
            results = []
            try:
                for number, (count, chunk) in enumerate(in_chunks(batch, self.chunk), start=first):
                    own = seed + 1009 * number if self.plan.randomness == "different" else seed
                    loop = reseeded(self.loop, own) if mode.random else self.loop
                    results.append((count, self.attempt(make, loop, mode, meta, chunk)))
                return results
            except RuntimeError as error:
                size = self.chunk or tree.leaves(batch)[0].shape[0]
                if self.plan.chunk_size != "auto" or size == 1 or not out_of_memory(error):
                    raise
                self.chunk = (size + 1) // 2
                warn_once(f"fmeta ran out of memory with {size} tasks a chunk and goes on with {self.chunk}")

    def attempt(self, make: Any, loop: InnerLoop, mode: Mode, meta: Tree, chunk: Task) -> Any:
        """Run one chunk with the function built for this mode."""
        if Recorder.active and not mode.compiled:
            Recorder.active.broken = True
        if mode.random or torch.compiler.is_compiling():
            return make(loop, mode)(meta, chunk)
        key = (getattr(make, "args", ()), mode.compiled, mode.merges(loop), mode.inside)
        if key not in self.built:
            self.built[key] = make(loop, mode)
        return self.built[key](meta, chunk)
