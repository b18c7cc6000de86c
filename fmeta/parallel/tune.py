"""``Plan(chunk_size="auto")``: how many tasks run side by side, found by timing once and remembered.

Every size is a compilation of its own, which takes seconds, so few are tried: all tasks, as far as memory
allows, and where that call is slow enough for the answer to matter, at most two smaller sizes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fmeta import tree
from fmeta.parallel.kernels import cache_folder
from fmeta.types import InnerLoop, Plan, Tree

LOG = logging.getLogger("fmeta")
WORTH_IT = 0.05
"""Seconds of a call below which no other size is tried."""
REPEATS = 3
LONG = 2.0
"""Seconds of timed calls after which a size is not timed again."""
MARGIN = 0.97
"""A smaller size must take less than this part of the time of a larger one."""
SHARE = 0.5
"""The part of free memory that a first size may be predicted to fill."""
MEMORY = pathlib.Path("/proc/meminfo")

known: dict[str, Choice] = {}


class Choice(NamedTuple):
    """A number of tasks a chunk, what each size that was tried took, and why it was chosen."""

    size: int
    tasks: int
    milliseconds: dict[int, float]
    why: str

    def __str__(self) -> str:
        """One line for a log."""
        timed = ", ".join(f"{size}: {ms:.1f} ms" for size, ms in self.milliseconds.items())
        return f"{self.size} of {self.tasks} tasks side by side ({self.why}; {timed})"


def choose(
    run: Callable[[int], int], tasks: int, start: int, agree: Callable[[Any], Any], device: torch.device
) -> Choice:
    """Time a few sizes from ``start`` down.

    Args:
        run: makes one call with chunks of a size, and returns the size that memory allowed.
        tasks: the number of tasks that a call has.
        start: the first size.
        agree: what rank 0 measured is what all ranks go by, so that they try the same sizes.
        device: where the work is done.
    """
    found: dict[int, float] = {}

    def measure(size: int) -> float:
        held = [run(size)]
        seconds = median_seconds(lambda: held.append(run(held[-1])), agree, device)
        return found.setdefault(agree(held[-1]), seconds)

    first = measure(start)
    start = next(iter(found))
    if first <= WORTH_IT:
        why = f"a call takes at most {1000 * WORTH_IT:.0f} ms, nothing else was tried"
        return Choice(start, tasks, in_milliseconds(found), why)
    second_size = part_near(tasks, start / 4)
    if second_size < start:
        second = measure(second_size)
        if second < MARGIN * first:
            third_size = part_near(tasks, second_size / 4)
        else:  # one between the two, unless the smaller one was hopeless
            third_size = part_near(tasks, start / 2) if second < 1.2 * first else start
        if third_size not in (start, second_size):
            measure(third_size)
    best = min(found.values())
    size = max(size for size, seconds in found.items() if MARGIN * seconds <= best)
    return Choice(size, tasks, in_milliseconds(found), "the fastest that was timed")


def median_seconds(run: Callable[[], Any], agree: Callable[[Any], Any], device: torch.device) -> float:
    """Time of a call, the same on all ranks; the caller has warmed it up."""
    seconds: list[float] = []
    while not seconds or (len(seconds) < REPEATS and sum(seconds) < LONG):
        begin = clock(device)
        run()
        seconds.append(agree(clock(device) - begin))  # or one rank would stop before the others
    return statistics.median(seconds)


def in_milliseconds(seconds: dict[int, float]) -> dict[int, float]:
    """Times to print and to keep."""
    return {size: round(1000 * value, 3) for size, value in seconds.items()}


def part_near(tasks: int, target: float) -> int:
    """A chunk size near ``target`` that leaves no smaller last chunk, which would be one more kernel."""
    divisors = [size for size in range(1, tasks + 1) if tasks % size == 0]
    nearest = min(divisors, key=lambda size: abs(math.log(size / max(target, 1.0))))
    return nearest if target / 2 <= nearest <= target * 2 else max(int(target), 1)


def clock(device: torch.device) -> float:
    """The time once the device has nothing left to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def carries_kept(loop: InnerLoop, plan: Plan) -> int:
    """The most carries that the adjoint engine holds for its backward loop."""
    exact = loop.steps if loop.adjoint.last is None else min(loop.adjoint.last, loop.steps)
    if plan.remat is None or not exact:
        return max(exact, 1)
    return min(-(-exact // plan.remat) + plan.remat, exact)


def start_size(loop: InnerLoop, plan: Plan, meta: Tree, tasks: int, activations: int) -> int:
    """All tasks, or as many as are predicted to fit: forward values, tangents and both their gradients."""
    carry = sum(leaf.nbytes for leaf in tree.leaves(meta))
    one = 4 * activations + carries_kept(loop, plan) * carry
    size = tasks
    while size > 1 and size * one > SHARE * free_bytes(tree.device(meta)):
        size = (size + 1) // 2
    return size


def free_bytes(device: torch.device) -> float:
    """Memory that can still be had on a device; infinite where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = MEMORY.read_text().splitlines()
    except OSError:
        return math.inf
    return next(
        (1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), math.inf
    )


def key_of(*parts: Any, device: torch.device) -> str:
    """A name for what a choice depends on: shapes and the loop (``parts``), machine, threads, torch."""
    machine = (platform.machine(), torch.backends.cpu.get_cpu_capability(), os.cpu_count())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    told = repr((parts, machine, name, torch.get_num_threads(), torch.__version__))
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def recall(key: str) -> Choice | None:
    """A choice made earlier, in this process or another; None where there is none that can be read."""
    if key not in known:
        try:
            found = json.loads(path_of(key).read_text())
            times = {int(size): float(ms) for size, ms in found["milliseconds"].items()}
            known[key] = Choice(int(found["size"]), int(found["tasks"]), times, str(found["why"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
    return known[key]


def remember(key: str, choice: Choice) -> None:
    """Keep a choice in this process and, where the folder can be written to, for later ones."""
    known[key] = choice
    file = path_of(key)
    draft = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(choice._asdict()))
        draft.replace(file)
    except OSError as error:
        LOG.info("chunk_size=auto: the choice is not kept for later processes: %s", error)


def path_of(key: str) -> pathlib.Path:
    """The file of a choice."""
    return cache_folder() / "chunks" / f"{key}.json"


def tuned(key: str, agree: Callable[[Any], Any], make: Callable[[], Choice]) -> Choice:
    """The remembered choice or a new one, the same on all ranks."""
    choice: Choice | None = agree(recall(key))
    how = "remembered"
    if choice is None:
        choice, how = make(), "timed now"
        remember(key, choice)
    LOG.info("chunk_size=auto: %s, %s", choice, how)
    return choice
