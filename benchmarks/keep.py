"""Keep a finished run as a line of the truth table: its config, metrics and learned numbers.

`python -m benchmarks.keep RUN NAME` writes benchmarks/checkpoints/NAME, which `fmeta eval` tests again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fmeta.learned import FILE
from fmeta.train.folder import keep, read_config

KEPT = Path(__file__).parent / "checkpoints"

if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("benchmarks.keep: expected two arguments, a run folder and a name")
    run, kept = Path(sys.argv[1]), KEPT / sys.argv[2]
    if read_config(run).recipe == "learned-optimizer":
        kept.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "metrics.jsonl", FILE):
            (kept / name).write_bytes((run / name).read_bytes())
    else:
        keep(run, kept)
    print(KEPT / sys.argv[2])
