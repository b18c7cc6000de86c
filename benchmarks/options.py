"""The command's options, read by all suites."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from benchmarks.cells import CELLS, TINY, Cell, chosen
from benchmarks.contenders import PEERS, Setting

Suite = Literal["speed", "memory", "compile", "scaling", "ranks", "norms", "all", "report"]
Peer = Literal["fmeta-step", "loop", "higher", "torchopt", "vmap", "jax", "jax-scan"]


@dataclass(frozen=True)
class Options:
    """Benchmark fmeta on this machine against its peers, in the same run."""

    run: tyro.conf.Positional[Path | None] = None
    """Folder of an earlier run, for `--suite report`: tables and plots are made again from its results.jsonl."""
    suite: Suite = "speed"
    """speed: a meta-gradient against peers. memory: peak against inner steps. compile: seconds to the first
    meta-step, cold and warm. scaling: 10,000 tasks in chunks. ranks: two processes against one. norms: how
    wrong nested torch.func is through norm layers. all: each of these. report: no measurement, see RUN."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    peers: Annotated[tuple[Peer, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = PEERS  # type: ignore[assignment]
    """Beside fmeta, in the speed suite: fmeta-step loop higher torchopt vmap jax jax-scan. One that is not
    installed is reported as absent."""
    quick: bool = False
    """Tiny cells, few calls, no --memory: about two minutes. Shows that all runs; its figures mean little."""
    only: tuple[str, ...] = ()
    """Run only cells of these names, with * and ? as wildcards: --only 'sinusoid-*x10' 'conv4*'. See --list."""
    list: bool = False
    """Show the cells of the suite and stop."""
    out: Path | None = None
    """Run folder; benchmarks/reports/<date>-<device> if not given. Results are appended."""
    resume: bool = False
    """Skip cells that the run folder has results of."""
    jax_python: str | None = None
    """Python of an environment with jax and numpy. Else $FMETA_BENCH_JAX, else this Python if it has jax."""
    threads: int | None = None
    """CPU threads of every contender; torch's choice if not given."""
    rounds: int = 5
    """Blocks a cell: in each, every contender is visited once, in alternating order; ratios are of one block."""
    seconds: float = 3.0
    """Time of a contender in a block; a slower one gets one call."""
    calls: int = 200
    """At most so many calls of a contender in a block."""
    limit: float = 60.0
    """Seconds that one call may take; a slower peer is given up and reported so."""
    memory: bool = True
    """Measure peak memory of each contender too, each in a process of its own (starts it once more)."""

    def setting(self) -> Setting:
        """What contenders must know."""
        return Setting(self.device, self.limit, jax_python=self.jax_python)

    def pick(self, names: Iterable[str]) -> Sequence[str]:
        """The cells that ``--only`` lets run."""
        return [name for name in names if chosen(name, self.only)]

    def cells(self) -> Sequence[Cell]:
        """The cells of the speed suite."""
        return [cell for cell in (TINY if self.quick else CELLS) if chosen(cell.name, self.only)]
