"""What every benchmark shares: timing, time limits, peak memory, the machine's matmul rate."""

from __future__ import annotations

import contextlib
import gc
import resource
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


class OverTime(Exception):
    """A call ran past its limit."""


def synchronize(device: str) -> None:
    """Wait for a device's queue; a CPU has none."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(fn: Callable[[], Any], device: str = "cpu") -> tuple[float, Any]:
    """How long one call took until its result was there, and the result."""
    synchronize(device)
    begin = time.perf_counter()
    result = fn()
    synchronize(device)
    return time.perf_counter() - begin, result


def block(fn: Callable[[], Any], budget: float, most: int, device: str = "cpu") -> list[float]:
    """Milliseconds of up to ``most`` calls within ``budget`` seconds, at least one; slow calls have no burn-in."""
    gc.collect()
    first, _ = seconds(fn, device)
    if first > budget / 4:
        times = [first]
        budget -= first
    else:
        times = []
    begin = time.perf_counter()
    while len(times) < most and (not times or time.perf_counter() - begin + times[-1] < budget):
        times.append(seconds(fn, device)[0])
    return [1e3 * t for t in times]


@contextlib.contextmanager
def limit(most: float) -> Iterator[None]:
    """Raise ``OverTime`` inside the block after ``most`` seconds, at the next return to Python."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise OverTime(f"over the limit of {most:g} s a call")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, most)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def resident_mib(peak: bool = False) -> float:
    """Resident memory of this process in MiB, now or at most since `forget_peak`."""
    status = Path("/proc/self/status")
    if status.exists():
        key = "VmHWM:" if peak else "VmRSS:"
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) / 2**10
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**20 if sys.platform == "darwin" else most / 2**10


def forget_peak(device: str = "cpu") -> bool:
    """Let the peak start from here; False where the system cannot, so that it is that of the whole process."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return True
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def memory_mib(device: str = "cpu", peak: bool = False) -> float:
    """Memory in use, or its peak: of the device where it is a GPU, of the process otherwise."""
    if device.startswith("cuda"):
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    return resident_mib(peak)


def added_mib(before: float, fn: Callable[[], Any], device: str = "cpu") -> float:
    """Peak memory of one call beyond ``before``."""
    gc.collect()
    forget_peak(device)
    fn()
    synchronize(device)
    return memory_mib(device, peak=True) - before


def matmul_gflops(device: str = "cpu", size: int = 1024, calls: int = 7) -> float:
    """The rate of a float32 matrix product of this size, the median of a few."""
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    times = block(lambda: a @ b, budget=2.0, most=calls, device=device)
    return 2 * size**3 / (statistics.median(times) * 1e6)


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"[:300]
