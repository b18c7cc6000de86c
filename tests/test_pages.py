"""Memory that a process keeps for tensors to come."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from fmeta.parallel import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def touch():
    x = torch.empty(2**25).fill_(1.0)  # 128 MiB
for _ in range(6):  # threads that start meanwhile may lie above a block, once
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"),
    reason="needs glibc",
)
def test_freed_memory_is_used_again_without_new_pages() -> None:
    faults = {}
    for word in ("plain", "keep"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, word], capture_output=True, text=True, check=True
        )
        faults[word] = int(done.stdout)
    assert faults["keep"] < faults["plain"] / 4
