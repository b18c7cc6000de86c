"""Memory of large tensors, which a process should keep while it makes tensors of the same sizes again and again."""

from __future__ import annotations

import ctypes
import sys

TRIM, PAD, MAPS = -1, -2, -4  # M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_MAX of malloc.h
KEPT = 2**31 - 1
"""Bytes of free memory at the top of the heap from which on it goes back to the system."""


def keep_freed_memory() -> bool:
    """Let this process keep memory that it frees rather than give it back at once (glibc's malloc only).

    By default large blocks go back to the system when they are freed, and new ones are handed out page by page, each
    filled with zeros first: where every step makes tensors of some megabytes, that is a tenth of a training step of
    conv4, and half of an evaluation. It holds for the whole process, which stays as large as it ever was unless more
    than 2 GiB are free at the end of its memory; so a program calls it, not a library. The commands of fmeta do.

    Returns:
        Whether it was done: other systems, and other allocators, are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has none
        return False
    return all([mallopt(MAPS, 0), mallopt(TRIM, KEPT), mallopt(PAD, 2**26)])
