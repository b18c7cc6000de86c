"""What a contender is, apart from how it computes."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from fmeta.types import Params


class Absent(Exception):
    """A peer that is not installed."""


class Setting(NamedTuple):
    """What a run fixes for all contenders."""

    device: str = "cpu"
    limit: float = 60.0
    """Seconds that one call may take."""
    compile_limit: float = 900.0
    """Seconds that compiling, with the first call, may take."""
    jax_python: str | None = None
    """Python of an environment that has jax."""


class Contender(Protocol):
    """One way to the meta-gradient of one problem."""

    def exact(self, tasks: int) -> Params:
        """The meta-gradient of the first tasks in float64."""
        ...

    def first(self) -> tuple[float, Params]:
        """Seconds of the first call, compilation included, and its result."""
        ...

    def times(self, budget: float, most: int) -> list[float]:
        """Milliseconds of some calls; see ``harness.block``."""
        ...

    def peak(self) -> dict[str, float]:
        """Peak of a warm call beyond what was there before it, ``call_mib``, and beyond the loaded problem,
        ``peak_mib``; only in a process of its own."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...
