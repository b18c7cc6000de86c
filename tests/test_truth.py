"""The kept runs behind the README's tables, and the comparison on regression families."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import fmeta
from fmeta.train.experiment import build
from fmeta.train.folder import load_run, read_config
from fmeta.train.options import with_tasks

KEPT = Path(__file__).parents[1] / "benchmarks" / "checkpoints"
REPORTED = Path(__file__).parents[1] / "benchmarks" / "reports" / "sinusoid_compare.json"
SINUSOID = sorted(path.name for path in KEPT.glob("sinusoid_*"))


@pytest.mark.parametrize("name", SINUSOID)
def test_a_kept_run_gives_its_reported_error(name: str) -> None:
    """On the first 100 of the reported tasks: within four standard errors of what was printed."""
    built, meta = load_run(KEPT / name)
    tasks = [built.test.sampler(built.test.seed, start) for start in (0, 50)]
    measure = fmeta.meta_eval(built.algorithm, fmeta.Plan(compile=False), steps=[0, 1])
    found = torch.cat([measure(meta, task)["loss"] for task in tasks])
    rows = {row["name"]: row["scores"] for row in json.loads(REPORTED.read_text())["runs"]}
    for column, score in enumerate(rows[name.removeprefix("sinusoid_")][:2]):
        error = score["interval"] / 1.96 * (1000 / len(found)) ** 0.5
        assert abs(found[:, column].mean().item() - score["mean"]) < 4 * error
    assert {path.stat().st_size < 2**20 for path in KEPT.glob("*/*.safetensors")} == {True}


OMNIGLOT = {
    "omniglot_maml_5w1s": (3, 0.983, 0.0041),
    "omniglot_maml_5w5s": (3, 0.994, 0.0011),
    "omniglot_maml_mlp_5w1s": (3, 0.917, 0.0088),
    "omniglot_maml_mlp_5w5s": (3, 0.977, 0.0022),
    "omniglot_protonet_60w1s": (0, 0.974, 0.0028),
    "omniglot_protonet_5w1s": (0, 0.955, 0.0040),
    "omniglot_protonet_60w1s_maxpool": (0, 0.987, 0.0019),
    "omniglot_maml_20w1s": (5, 0.779, 0.0061),
    "omniglot_anil_20w1s": (5, 0.768, 0.0061),
    "omniglot_reptile_5w1s": (20, 0.980, 0.0044),
    "omniglot_anil_20w5s": (5, 0.880, 0.0048),
    "omniglot_maml_20w5s": (5, 0.846, 0.0047),
    "omniglot_anil_20w1s_long": (5, 0.902, 0.0042),
    "omniglot_mamlpp_20w1s": (5, 0.850, 0.0052),
    "omniglot_cactus_5w1s": (3, 0.917, 0.0087),
    "omniglot_imaml_5w1s": (5, 0.987, 0.0034),
    "omniglot_metasgd_5w1s": (3, 0.990, 0.0032),
    "omniglot_r2d2_5w1s": (0, 0.983, 0.0023),
    "omniglot_umtra_5w1s": (3, 0.855, 0.0104),
}
"""Inner steps, accuracy and the half-width of its interval on 1,000 tasks, as reported."""


OTHER_SIZES = {
    ("omniglot_protonet_60w1s_maxpool", 5, 5, None): (0.996, 0.0010),
    ("omniglot_protonet_60w1s_maxpool", 20, 1, None): (0.951, 0.0020),
    ("omniglot_protonet_60w1s_maxpool", 20, 5, None): (0.986, 0.0010),
    ("omniglot_umtra_5w1s", 5, 5, None): (0.968, 0.0053),
    ("omniglot_maml_5w1s", 5, 5, 5): (0.992, 0.0012),
}
"""The same for runs on tasks of other ways, shots and queries than they were trained for."""


def case(name: str, ways: int | None = None, shots: int | None = None, queries: int | None = None) -> Any:
    """A kept run, its tasks and what was reported."""
    steps, mean, interval = OMNIGLOT[name]
    if shots is not None:
        mean, interval = OTHER_SIZES[name, ways, shots, queries]  # type: ignore[index]
    return pytest.param(
        name, (ways, shots, queries), (steps, mean, interval), id=f"{name} {ways or ''} {shots or ''}"
    )


@pytest.mark.skipif(
    not (Path(os.environ.get("FMETA_DATA", "")) / "omniglot").is_dir(), reason="needs $FMETA_DATA/omniglot"
)
@pytest.mark.parametrize(
    ("name", "sizes", "reported"), [*map(case, OMNIGLOT), *(case(*key) for key in OTHER_SIZES)]
)
def test_a_kept_run_gives_its_reported_accuracy(
    name: str, sizes: tuple[int | None, ...], reported: tuple[int, float, float]
) -> None:
    """On the first 50 of the reported tasks: within four standard errors of what was printed."""
    steps, mean, interval = reported
    _, meta = load_run(KEPT / name)
    built = build(with_tasks(read_config(KEPT / name), *sizes))
    measure = fmeta.meta_eval(built.algorithm, fmeta.Plan(compile=False), steps=[steps])
    found = measure(meta, built.test.sampler(built.test.seed, 0))["accuracy"]
    assert len(found) == 50
    assert abs(found.mean().item() - mean) < 4 * interval / 1.96 * (1000 / 50) ** 0.5


@pytest.mark.compiles
@pytest.mark.parametrize("problem", ["relu", "tanh"])
def test_the_kept_optimiser_beats_tuned_adam(problem: str) -> None:
    """On 24 of the reported trainings, with Adam at the best rate for them: as the report says, by a wide margin."""
    from fmeta import learned
    from fmeta.train.evaluate import TEST_SEED
    from fmeta.train.learning import setup as learning_setup

    folder = KEPT / "learned_meta_transformer"
    experiment, loaded = learning_setup.build(read_config(folder)), learned.load(folder)
    test = next(one for one in experiment.test if one.name == problem)
    tasks = test.sample(TEST_SEED, 0, 24, 200)
    own = learned.curves(test, loaded.rule, loaded.theta, tasks, 200).mean(1)
    adam = learned.at_rates(test, "adam", False, tasks, 200).nan_to_num(1e4).mean(2)
    difference = own - adam[adam.mean(1).argmin()]
    assert difference.mean() + 1.96 * difference.std() / len(difference) ** 0.5 < -0.1


def test_there_are_kept_runs() -> None:
    assert len(SINUSOID) >= 4
    assert set(OMNIGLOT) == {path.name for path in KEPT.glob("omniglot_*")}


def test_families_are_compared(tmp_path: Path) -> None:
    families: Any = pytest.importorskip("benchmarks.families", reason="needs scikit-learn, from .[bench]")
    torch.manual_seed(0)
    lines = [f"{t},{x},{(t % 5) * x + 0.01 * t}" for t in range(15) for x in range(8)]
    (tmp_path / "lines.csv").write_text("task,x,y\n" + "\n".join(lines) + "\n")
    out = tmp_path / "out.json"
    options = families.Options(tmp_path, out, shots=4, folds=3, draws=2, outer_steps=250)
    families.main(options)
    (row,) = json.loads(out.read_text())["families"]
    assert row["family"] == "lines" and row["individuals"] == 15
    errors = {name: value["mean"] for name, value in row["errors"].items()}
    assert errors["ridge"] < errors["pooled linear"]  # slopes differ from task to task
    for name, difference in row["meta_learned_minus"].items():
        assert difference["mean"] == pytest.approx(errors["meta-learned"] - errors[name])
