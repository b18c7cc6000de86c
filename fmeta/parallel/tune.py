"""``Plan(chunk_size="auto")``: how many tasks run side by side, found by timing once and remembered.

Every size is a compilation of its own, which takes seconds, so few are tried: all tasks, as far as memory
allows, and where that call is slow enough for the answer to matter, at most two smaller sizes.
"""

from __future__ import annotations

import math
import pathlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from fmeta import tree
from fmeta.parallel import store
from fmeta.parallel.store import LOG, clock
from fmeta.types import InnerLoop, Plan, Task, Tree

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


def in_chunks(tasks: Task, size: int | None) -> Iterator[tuple[int, Task]]:
    """Parts of at most ``size`` tasks, all of them for None, with their counts; the last may be smaller."""
    count = tree.leaves(tasks)[0].shape[0]
    if size is None or size >= count:
        yield count, tasks
        return
    for begin in range(0, count, size):
        end = min(begin + size, count)
        yield end - begin, tree.map(lambda leaf, b=begin, e=end: leaf[b:e], tasks)


def part_near(tasks: int, target: float) -> int:
    """A chunk size near ``target`` that leaves no smaller last chunk, which would be one more kernel."""
    divisors = [size for size in range(1, tasks + 1) if tasks % size == 0]
    nearest = min(divisors, key=lambda size: abs(math.log(size / max(target, 1.0))))
    return nearest if target / 2 <= nearest <= target * 2 else max(int(target), 1)


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


def recall(key: str) -> Choice | None:
    """A choice made earlier, in this process or another; None where there is none that can be read."""
    if key not in known:
        try:
            found = store.read("chunks", key)
            times = {int(size): float(ms) for size, ms in found["milliseconds"].items()}
            known[key] = Choice(int(found["size"]), int(found["tasks"]), times, str(found["why"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
    return known[key]


def remember(key: str, choice: Choice) -> None:
    """Keep a choice in this process and, where the folder can be written to, for later ones."""
    known[key] = choice
    store.write("chunks", key, choice._asdict())


def tuned(key: str, agree: Callable[[Any], Any], make: Callable[[], Choice]) -> Choice:
    """The remembered choice or a new one, the same on all ranks."""
    choice: Choice | None = agree(recall(key))
    how = "remembered"
    if choice is None:
        choice, how = make(), "timed now"
        remember(key, choice)
    LOG.info("chunk_size=auto: %s, %s", choice, how)
    return choice
