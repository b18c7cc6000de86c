"""Commands that ``test_mesh_train.py`` runs on two ranks each, forked from a process that has torch loaded.

``python tests/mesh_commands.py FOLDER COMMANDS``: COMMANDS is a list of argument lists, as JSON; what rank R says
and its exit code for command N go to ``FOLDER/N.R.json``. In the last command rank 1 fails alone.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fmeta.train import baselines, cli, loop

SECONDS = 60


def fail(*arguments: Any) -> None:
    raise OSError("the disk of rank 1 is full")


def one_rank(arguments: list[str], rank: int, port: int, fails: bool, answer: Path) -> None:
    """Run a command with the environment that torchrun sets."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    if fails:
        loop.absorb = fail  # type: ignore[assignment]
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code: Any = cli.main(arguments)
        except SystemExit as leaving:
            code = leaving.code
    answer.write_text(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}))
    os._exit(0)  # the connections close here, as when a process ends


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def main(folder: Path, commands: list[list[str]]) -> None:
    baselines.RATES = (0.01, 0.1)
    for number, arguments in enumerate(commands):
        port, last = free_port(), number == len(commands) - 1
        ranks = [
            get_context("fork").Process(
                target=one_rank,
                args=(arguments, rank, port, last and rank == 1, folder / f"{number}.{rank}.json"),
            )
            for rank in range(2)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(SECONDS)
            process.kill()  # whoever still waits has no answer, which the test then misses


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
