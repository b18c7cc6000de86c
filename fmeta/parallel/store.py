"""What was measured once and is kept from process to process, by what it depends on; and how it is measured."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pathlib
import platform
import time
from typing import Any

import torch

LOG = logging.getLogger("fmeta")


def cache_folder() -> pathlib.Path:
    """Where compiled kernels are kept: ``$FMETA_CACHE``, else the user's cache directory."""
    base = os.environ.get("FMETA_CACHE")
    if base:
        return pathlib.Path(base) / "kernels"
    return (
        pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "fmeta" / "kernels"
    )


def key_of(*parts: Any, device: torch.device) -> str:
    """A name for what a finding depends on: shapes and the loop (``parts``), machine, threads, torch."""
    machine = (platform.machine(), torch.backends.cpu.get_cpu_capability(), os.cpu_count())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    told = repr((parts, machine, name, torch.get_num_threads(), torch.__version__))
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def path_of(kind: str, key: str) -> pathlib.Path:
    """The file of a finding."""
    return cache_folder() / kind / f"{key}.json"


def read(kind: str, key: str) -> Any:
    """A finding made earlier, in this process or another; None where there is none that can be read."""
    try:
        return json.loads(path_of(kind, key).read_text())
    except (OSError, ValueError):
        return None


def write(kind: str, key: str, found: Any) -> None:
    """Keep a finding where the folder can be written to."""
    file = path_of(kind, key)
    draft = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(found))
        draft.replace(file)
    except OSError as error:
        LOG.info("%s: a finding is not kept for later processes: %s", kind, error)


def clock(device: torch.device) -> float:
    """The time once the device has nothing left to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
