"""What the user sees while a run works: the progress bar, the lines above it, and Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tqdm import tqdm

from fmeta.parallel import launched

BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Bar(NamedTuple):
    """A progress bar over outer steps; silent where the output is not a terminal."""

    stepped: Callable[[int], None]
    show: Callable[[dict[str, float]], None]
    restart_clock: Callable[[], None]
    """Forget the time so far, that of the first step, when estimating what is left."""


def say(text: str = "") -> None:
    """Print a line above the progress bar; of several processes, the first speaks for all."""
    if launched().rank == 0:
        tqdm.write(text)


@contextmanager
def progress_bar(label: str, steps: int, done: int = 0) -> Iterator[Bar]:
    """Show a bar of ``steps``, of which ``done`` are over."""
    hidden = True if launched().rank else None  # None: where the output is not a terminal
    with tqdm(
        desc=label, total=steps, initial=done, disable=hidden, dynamic_ncols=True, bar_format=BAR, leave=False
    ) as bar:

        def stepped(step: int) -> None:
            bar.update(step - bar.n)

        def restart_clock() -> None:
            step = bar.n
            bar.reset(steps)
            bar.n = bar.initial = bar.last_print_n = step

        yield Bar(
            stepped, lambda numbers: bar.set_postfix_str(describe(numbers), refresh=False), restart_clock
        )


def describe(numbers: dict[str, float]) -> str:
    """Metrics in words: ``1,234 tasks/s, loss 0.51, accuracy 97.1 %``."""
    said = []
    if "tasks_per_s" in numbers:
        said.append(f"{numbers['tasks_per_s']:,.0f} tasks/s")
    if "loss" in numbers:
        said.append(f"loss {numbers['loss']:.3f}")
    if "accuracy" in numbers:
        said.append(f"accuracy {format_metric('accuracy', numbers['accuracy'])}")
    if numbers.get("skipped"):
        said.append(f"{numbers['skipped']:.0f} steps skipped")
    return ", ".join(said)


def format_metric(name: str, value: float) -> str:
    """An accuracy in per cent, anything else with three digits."""
    return f"{100 * value:.1f} %" if name == "accuracy" else f"{value:.3f}"


def format_seconds(seconds: float) -> str:
    """``41 s``, ``3 min 20 s`` or ``1 h 12 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 10 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a question that the loop asks after each step.

    A second Ctrl-C interrupts at once. Outside of the main thread, where Python allows no handlers, the
    answer is always no.
    """
    asked: list[int] = []

    def note(number: int, frame: object) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        say("Stopping after this step; Ctrl-C again to stop at once without saving.")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
