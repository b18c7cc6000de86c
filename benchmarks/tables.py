"""The tables of a report, one function a suite: ``(rows) -> Markdown``, empty where the suite did not run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.contenders import ABOUT
from benchmarks.results import Row


def table(head: list[str], rows: Iterable[list[Any]]) -> str:
    """A Markdown table."""
    clean = lambda cell: str(cell).replace("|", "\\|").replace("\n", " ")  # noqa: E731
    cells = [head, ["---"] * len(head), *([clean(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def number(value: float | None) -> str:
    """Three significant digits, and all digits before the point."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ranged(value: dict[str, float] | None) -> str:
    """Median (smallest to largest)."""
    if not value:
        return ""
    return f"{number(value['median'])} ({number(value['min'])} to {number(value['max'])})"


def seen(rows: list[Row], key: Callable[[Row], Any]) -> list[Any]:
    """Distinct values in order of appearance; empty ones are left out."""
    return list(dict.fromkeys(value for value in map(key, rows) if value))


def of(rows: list[Row], suite: str) -> list[Row]:
    """The rows of a suite."""
    return [row for row in rows if row.suite == suite]


def speed(rows: list[Row]) -> str:
    """The matrix of times, then every figure."""
    rows = of(rows, "speed")
    if not rows:
        return ""
    names, cells = seen(rows, lambda row: row.who), seen(rows, lambda row: row.cell)
    found = {(row.cell, row.who): row for row in rows}

    def short(row: Row | None) -> str:
        if row is None:
            return ""
        if "ms" not in row.result:
            return row.status.partition(":")[0]
        ratio = row.result.get("ratio")
        beside = f" ({number(ratio['median'])}x)" if ratio and row.who != "fmeta" else ""
        return number(row.result["ms"]["median"]) + beside

    matrix = table(
        ["cell", *names], ([cell, *(short(found.get((cell, who))) for who in names)] for cell in cells)
    )
    abouts = [
        f"- {row.cell}: {row.config['about']}; {sizes(row.config)}" for row in rows if row.who == "fmeta"
    ]
    details = table(
        ["cell", "who", "ms", "tasks/s", "time / fmeta's", "% of matmul", "peak MiB", "first call s",
         "differs float64 / float32", "calls", "status"],
        (detail(row) for row in rows),
    )  # fmt: skip
    legend = [f"- {who}: {ABOUT.get(who, '')}" for who in names]
    return "\n\n".join(
        [
            "## Speed: one meta-gradient",
            "Milliseconds, median; in brackets how many times fmeta's time (median of ratios inside a block).",
            matrix,
            "\n".join(legend),
            "\n".join(abouts),
            "Median (range) of all calls; ratios are of block medians, and the range is that over blocks. A slow "
            "contender gets one call a block. `% of matmul`: operations of the textbook computation (products and "
            "convolutions, torch's flop counter on the loop) a second, against a 1024^3 float32 product timed in "
            "the same block. `peak MiB`, in a process of its own: of a warm call beyond "
            "what the process held before it / beyond the loaded problem, with all code, kernels and freed memory that "
            "the process keeps. `first call`: with the caches that the machine had; see Compile. "
            "`differs`: relative difference of the meta-gradient from fmeta's before timing, on the first tasks in "
            "float64, and as timed.",
            details,
        ]
    )


def sizes(config: dict[str, Any]) -> str:
    """A cell's sizes in words."""
    ways = f"{config['ways']} ways, " if config["ways"] > 1 else ""
    return (
        f"{config['tasks']} tasks, {ways}{config['shots']} shots, {config['queries']} queries, "
        f"{config['steps']} inner steps, rate {config['lr']}"
    )


def detail(row: Row) -> list[str]:
    """A row of the long table."""
    r = row.result
    share = {k: 100 * v for k, v in r["share_of_matmul"].items()} if "share_of_matmul" in r else None
    errors = [f"{r[key]:.0e}" for key in ("error_float64", "error_float32") if key in r]
    peaks = [number(r[key]) for key in ("call_mib", "peak_mib") if key in r]
    return [
        row.cell, row.who, ranged(r.get("ms")), number(r.get("tasks_per_s")),
        ranged(r.get("ratio")) if row.who != "fmeta" else "", number(share["median"]) if share else "",
        " / ".join(peaks) or r.get("no_peak", ""), number(r.get("first_s")),
        " / ".join(errors), str(r.get("calls", "")), row.status,
    ]  # fmt: skip


def by_steps(rows: list[Row], suite: str, heading: str, show: Callable[[Row], str]) -> str:
    """One row a cell, one column a contender."""
    rows = of(rows, suite)
    if not rows:
        return ""
    names, cells = seen(rows, lambda row: row.who), seen(rows, lambda row: row.cell)
    found = {(row.cell, row.who): row for row in rows}
    shown = lambda row: "" if row is None else show(row) if row.result else row.status  # noqa: E731
    body = ([cell, *(shown(found.get((cell, who))) for who in names)] for cell in cells)
    return f"{heading}\n\n{table(['cell', *names], body)}"


def memory(rows: list[Row]) -> str:
    """Peak memory against inner steps."""
    first = next(iter(of(rows, "memory")), None)
    sizes_of = (
        f"{first.config['tasks']} tasks, {first.config['size']}x{first.config['size']}" if first else ""
    )
    text = (
        f"## Memory: MiB added by one meta-gradient of conv4, {sizes_of}\n\nUncompiled, peak of a process of its "
        "own. nested: grad(mean(vmap(loss))). remat: blocks of about sqrt(steps) inner steps."
    )
    return by_steps(
        rows, "memory", text, lambda row: f"{number(row.result['mib'])} ({number(row.result['seconds'])} s)"
    )


def compiling(rows: list[Row]) -> str:
    """Cold and warm starts."""
    text = (
        "## Compile: seconds from after the imports to the first result, cold / warm\n\nCold: empty caches. Warm: "
        "a new process that finds them full. fmeta: a whole outer step. nested: torch.compile of the unrolled "
        "loop. CPU seconds, compilers included, in brackets."
    )

    def show(row: Row) -> str:
        def one(state: str) -> str:
            seconds, cpu = row.result.get(f"{state}_seconds"), row.result.get(f"{state}_cpu_seconds")
            return number(seconds) + (f" ({number(cpu)})" if cpu is not None else "")

        return f"{one('cold')} / {one('warm')}" + ("" if row.status == "timed" else f" {row.status}")

    return by_steps(rows, "compile", text, show)


def scaling(rows: list[Row]) -> str:
    """Time and memory against tasks."""
    chunk = next((row.config["chunk_size"] for row in of(rows, "scaling") if row.config["chunk_size"]), "")
    text = (
        f"## Scaling: ms a task, MiB added by a warm call\n\nchunks: `chunk_size={chunk}`; "
        "whole: all tasks side by side."
    )
    return by_steps(
        rows,
        "scaling",
        text,
        lambda row: f"{number(row.result['ms_a_task'])} ms, {number(row.result['mib'])} MiB",
    )


def ranks(rows: list[Row]) -> str:
    """Two processes against one."""
    text = "## Ranks: ms of an outer step, torchrun, gloo on a CPU, one thread a rank"

    def show(row: Row) -> str:
        if "ms" not in row.result:
            return row.status
        ratios = ", ".join(number(ratio) for ratio in row.result["ratio"])
        return f"{number(row.result['ms'])} (x {ratios}; update differs by {row.result['error']:.0e})"

    return by_steps(rows, "ranks", text, show)


def norms(rows: list[Row]) -> str:
    """Errors through norm layers."""
    text = "## Norms: relative error of the meta-gradient of one-step MAML, float64, against a loop on torch.autograd"
    return by_steps(rows, "norms", text, lambda row: f"{row.result['error']:.1e}")


TABLES = (speed, memory, compiling, scaling, ranks, norms)
