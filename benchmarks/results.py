"""A run's folder: one line of JSON a result, appended as results come, so that a run can be stopped and continued."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

REPORTS = Path(__file__).parent / "reports"


class Row(NamedTuple):
    """One result. ``who`` is a contender or a variant; ``status`` is "timed" unless something went otherwise."""

    suite: str
    cell: str
    who: str
    status: str
    config: dict[str, Any]
    result: dict[str, Any]
    run: dict[str, Any]


class Results:
    """The rows of one run folder."""

    def __init__(self, folder: Path, device: str = "cpu", resume: bool = False) -> None:
        """Create the folder where it is missing."""
        self.folder, self.file, self.device = folder, folder / "results.jsonl", device
        folder.mkdir(parents=True, exist_ok=True)
        self.done = {(row.suite, row.cell) for row in read(folder)} if resume else set()

    def has(self, suite: str, cell: str) -> bool:
        """Whether a resumed run holds this cell already."""
        return (suite, cell) in self.done

    def add(
        self,
        suite: str,
        cell: str,
        who: str,
        config: dict[str, Any],
        result: dict[str, Any],
        status: str = "timed",
    ) -> None:
        """Append a row with versions, machine and load, and say so on the terminal."""
        row = Row(suite, cell, who, status, config, result, environment(self.device))
        with self.file.open("a") as file:
            file.write(json.dumps(row._asdict()) + "\n")
        print(f"{suite:8} {cell:22} {who:12} {status[:100]:10} {brief(result)}", flush=True)


def brief(result: dict[str, Any]) -> str:
    """The figures of a result in a line: medians of spreads, no lists."""
    single = {
        k: v["median"] if isinstance(v, dict) else v for k, v in result.items() if not isinstance(v, list)
    }
    return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in single.items())[:240]


def read(folder: Path) -> list[Row]:
    """All rows of a folder; where a result was measured again, the last one."""
    file = folder / "results.jsonl"
    if not file.exists():
        return []
    rows = [Row(**json.loads(line)) for line in file.read_text().splitlines() if line.strip()]
    latest = {(row.suite, row.cell, row.who): row for row in rows}
    return list(latest.values())


def default_folder(device: str) -> Path:
    """``reports/<date>-<device>``."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return REPORTS / f"{time.strftime('%Y%m%d')}-{name}"


def device_name(device: str) -> str:
    """A GPU's name, or the number of CPU cores this process may use."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"cpu {cores} cores"


def environment(device: str) -> dict[str, Any]:
    """What a figure depends on besides its config."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "device": device_name(device),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "fmeta", "higher", "torchopt")},
    }


def version(package: str) -> str:
    """Of an installed package; empty where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit of this checkout, with a plus where tracked files differ; empty outside of one."""
    git = lambda *args: subprocess.run(  # noqa: E731
        ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    ).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", "../fmeta", ":!reports")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except OSError:
        return ""


def processor() -> str:
    """The CPU's name where the system tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    names = (
        [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0].partition(":")[2].strip() if names else platform.machine()
