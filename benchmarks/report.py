"""Tables of a run, in Markdown, from its results.jsonl alone."""

from __future__ import annotations

from pathlib import Path

from benchmarks import plots
from benchmarks.results import Row, read
from benchmarks.tables import TABLES, of, seen


def write(folder: Path) -> Path:
    """Make ``report.md`` and the plots of a run folder again; returns the report's path."""
    rows = read(folder)
    if not rows:
        raise ValueError(
            f"report: results were expected, {folder / 'results.jsonl'} has none. Measure first."
        )
    pictures = plots.draw(folder, rows)
    sections = [title(rows), *(table_of(rows) for table_of in TABLES), images(pictures), not_claimed(rows)]
    path = folder / "report.md"
    path.write_text("\n\n".join(section for section in sections if section) + "\n")
    return path


def title(rows: list[Row]) -> str:
    """Where, when and with what the run was made."""
    days = sorted({row.run["time"][:10] for row in rows})
    versions: dict[str, str] = {}
    for row in rows:
        versions |= {name: found for name, found in row.run["versions"].items() if found}
        versions |= {"jax": row.result["jax"]} if row.result.get("jax") else {}
    joined = lambda key: ", ".join(map(str, seen(rows, lambda row: row.run[key])))  # noqa: E731
    return "\n".join(
        [
            f"# Benchmarks, {joined('device')}, {days[0]}" + (f" to {days[-1]}" if len(days) > 1 else ""),
            "",
            f"- processor: {joined('processor')}; threads: {joined('threads')}",
            f"- commit: {joined('commit')} (+ : with local changes); Python {joined('python')}; "
            + ", ".join(f"{name} {found}" for name, found in versions.items()),
            f"- load average when a result was written: at most {max(row.run['load'] or 0 for row in rows)}",
            "- made by `python -m benchmarks`; `--suite report FOLDER` makes this file again from results.jsonl",
        ]
    )


def images(paths: list[Path]) -> str:
    """The plots."""
    return "\n\n".join(f"![{path.stem.replace('_', ' ')}]({path.name})" for path in paths)


def not_claimed(rows: list[Row]) -> str:
    """What a reader must not take from the figures."""
    lines = []
    if all(row.run["device"].startswith("cpu") for row in rows):
        lines.append("Nothing here ran on a GPU.")
    lines += [
        "Other machines, releases, networks and sizes than the ones named: ratios move with all of them.",
        "That a peer cannot be faster: each is written the way its own examples are, and not tuned beyond that.",
        "A share of the machine's best rate beyond what a 1024^3 product reaches; what is not a product or a "
        "convolution counts as no operation.",
        "Accuracy: inputs of all cells but sinusoid are random.",
    ]
    if of(rows, "speed"):
        lines.append(
            "Time of an outer optimiser, but in the row fmeta-step: the others time the meta-gradient."
        )
    if len(seen(rows, lambda row: row.run["commit"])) > 1:
        lines.append(
            "One state of the code: results of several commits are in this folder, see results.jsonl."
        )
    threads = max(row.run["threads"] for row in rows)
    if any((row.run["load"] or 0) > threads + 0.75 for row in rows):
        lines.append("A quiet machine: the load average was above the run's own threads for some results.")
    missing = [row for row in of(rows, "speed") if "ms" not in row.result]
    if missing:
        lines.append(
            "Anything about contenders without a time: "
            + "; ".join(f"{r.cell} {r.who}" for r in missing)
            + "."
        )
    return "## Not claimed\n\n" + "\n".join(f"- {line}" for line in lines)
