"""What leaves a run: programs that torch alone runs, weights in half, adapted models in torchvision's class."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from helpers import assert_trees_equal
from PIL import Image
from reference import networks
from tiny_runs import tiny_few_shot, tiny_sinusoid
from torch import Tensor

import fmeta
from fmeta import Batch
from fmeta.adapt import run as adapt
from fmeta.models import backbones
from fmeta.models.resnet20 import ResNet20
from fmeta.train import cli, commands, exporting, family
from fmeta.train.adapted import Source
from fmeta.train.cli import main
from fmeta.train.config import Config
from fmeta.train.experiment import build
from fmeta.train.folder import load_run
from fmeta.train.pictures import pretrained
from fmeta.train.pictures.adapting import load_picture_classifier
from fmeta.train.pictures.config import ImagesTask
from fmeta.train.recipes import RECIPES
from fmeta.train.run import run
from fmeta.types import Sampler

ALONE = """
import sys, torch
for name in sys.argv[1:]:
    inputs, expected = torch.load(name + ".in.pt", weights_only=True)
    outputs = torch.export.load(name).module()(*inputs)
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)
    print(name, (outputs - expected).abs().max().item())
assert not any(module.split(".")[0] == "fmeta" for module in sys.modules)
"""


def run_alone(*files: Path) -> None:
    """Load each file where only torch is imported, and compare with what lies beside it."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *map(str, files)], capture_output=True, text=True, cwd=files[0].parent
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(files)


def classification() -> tuple[Batch, Tensor]:
    generator = torch.Generator().manual_seed(0)
    support = Batch(torch.randn(6, 2, generator=generator), torch.arange(6) % 3)
    return support, torch.randn(4, 2, generator=generator)


def network() -> dict[str, Tensor]:
    weights = networks.mlp_weights([2, 8, 3], torch.Generator().manual_seed(1))
    return {name: x.float() for name, x in weights.items()}


LOSS = fmeta.losses.cross_entropy(networks.mlp)
ALGORITHMS: dict[str, Callable[[], fmeta.Algorithm]] = {
    "maml": lambda: fmeta.maml(LOSS, fmeta.sgd(0.5), steps=3),
    "adam inside": lambda: fmeta.maml(LOSS, fmeta.adam(0.05), steps=2),
    "metasgd": lambda: fmeta.metasgd(LOSS, steps=2, lr=0.3),
    "protonet": lambda: fmeta.protonet(networks.mlp, ways=3),
    "protomaml": lambda: fmeta.protomaml(networks.mlp, fmeta.sgd(0.1), steps=2, ways=3),
    "stopping": lambda: fmeta.early_stopping(fmeta.maml(LOSS, fmeta.sgd(0.5), steps=4), below=0.8),
}


def test_a_process_with_torch_alone_adapts_and_predicts(tmp_path: Path) -> None:
    support, x = classification()
    other = Batch(support.x.flip(0) * 2, support.y.roll(1))  # not the numbers it was traced with
    files = []
    for name, make in ALGORITHMS.items():
        algorithm, file = make(), tmp_path / f"{name}.pt2"
        meta = algorithm.init(network())
        made = fmeta.export_adaptation(algorithm, meta, support, x, file)
        assert made.operations > 0
        expected = algorithm.predict(meta, other, x - 1)
        torch.save(((other.x, other.y, x - 1), expected.detach()), f"{file}.in.pt")
        files.append(file)
    run_alone(*files)


def test_more_steps_than_were_trained() -> None:
    support, x = classification()
    algorithm, meta = fmeta.maml(LOSS, fmeta.sgd(0.5), steps=1), network()
    program = fmeta.export_adaptation(algorithm, meta, support, x, steps=5).program
    longer = fmeta.maml(LOSS, fmeta.sgd(0.5), steps=5).predict(meta, support, x)
    torch.testing.assert_close(program.module()(support.x, support.y, x), longer)


class Refuses(torch.autograd.Function):
    """An operation without a rule for torch.func."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda y: y * float(y.detach().sum().item() > 0),
            "tracing it failed|it reads the value of a tensor. Use torch.where",
        ),
        (lambda y: torch.nn.functional.dropout(y), "must draw no random numbers, but it calls"),
        (lambda y: Refuses.apply(y), "export: the adaptation must be one graph .* but tracing it failed"),
    ],
)
def test_what_is_no_fixed_graph_is_refused_with_the_reason(spoil: Any, said: str) -> None:
    support, x = classification()
    loss = fmeta.losses.cross_entropy(lambda params, x: spoil(networks.mlp(params, x)))
    algorithm = fmeta.maml(loss, fmeta.sgd(0.1), steps=1)
    with pytest.raises(NotImplementedError, match=said):
        fmeta.export_adaptation(algorithm, network(), support, x)


def test_values_that_are_read_outside_of_the_gradient_are_seen_too() -> None:
    support, x = classification()

    def apply(params: Any, x: Tensor) -> Tensor:
        return networks.mlp(params, x) * float(x.sum().item() > 0)

    algorithm = fmeta.protonet(apply, ways=3)
    with pytest.raises(NotImplementedError, match=r"it reads the value of a tensor. Use torch.where"):
        fmeta.export_adaptation(algorithm, network(), support, x)


# Runs


@pytest.fixture(scope="module", autouse=True)
def few_tasks() -> Iterator[None]:
    """As many held-out tasks side by side as these runs have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family, "HELD_BATCH", 6)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve classes of six pictures in colours of their own."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for c in range(12):
        (folder / f"c{c:02}").mkdir()
        for i in range(6):
            colour = torch.randint(20 * c, 20 * c + 16, (3,), generator=generator)
            Image.new("RGB", (20, 20), tuple(int(v) for v in colour)).save(folder / f"c{c:02}" / f"{i}.png")
    return folder


def images(data: Path, out: Path, algorithm: str = "anil", **task: Any) -> Config[Any]:
    """A tiny run of a backbone with random weights."""
    config = RECIPES["images"]()
    chosen = {
        "root": data, "size": 16, "ways": 3, "shots": 2, "queries": 2, "shares": (0.5, 0.25, 0.25),
        "backbone": "resnet20", "weights": None, "learns": "last-1", **task,
    }  # fmt: skip
    return replace(
        config,
        task=replace(config.task, **chosen),
        inner=replace(config.inner, algorithm=algorithm, inner_lr=0.1, inner_steps=2, test_steps=3),
        outer=replace(config.outer, outer_steps=4, tasks=2, schedule="constant"),
        report=replace(config.report, val_interval=2, val_tasks=4, test_tasks=6, baselines=False),
        machine=replace(config.machine, device="cpu", compile="off"),
        out=out,
    )  # type: ignore[return-value]


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    config = images(data, tmp_path_factory.mktemp("runs") / "anil")
    assert commands.train(config, "fmeta train images") == 0
    assert config.out is not None
    return config.out


def support_folder(data: Path, where: Path, classes: int = 3) -> Path:
    for c in range(classes):
        (where / f"c{c:02}").mkdir(parents=True)
        for i in range(2):
            (where / f"c{c:02}" / f"{i}.png").write_bytes((data / f"c{c:02}" / f"{i}.png").read_bytes())
    return where


def test_a_run_is_loaded_as_the_librarys_objects(folder: Path) -> None:
    algorithm, meta, config = fmeta.load(folder, "last")
    assert config.task.backbone == "resnet20"
    assert all(name.startswith(("body.layer3.", "head.")) for name in meta)
    task = build(config).family.test(0, 0)
    assert algorithm.predict(meta, Batch(task.support.x[0], task.support.y[0]), task.query.x[0]).shape == (
        6,
        3,
    )


def test_random_frozen_weights_are_pointed_out(data: Path, tmp_path: Path, capsys: Any) -> None:
    said = "resnet20 has random weights, and what is frozen of it stays so"
    build(images(data, tmp_path / "frozen"))
    assert said in capsys.readouterr().out
    build(images(data, tmp_path / "all", learns="all", batch_norm="batch"))
    assert said not in capsys.readouterr().out


def test_a_head_that_is_made_leaves_a_frozen_backbone_nothing_to_learn(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train: --learns head leaves protomaml nothing to learn"):
        commands.train(images(data, tmp_path / "run", "protomaml", learns="head"), "fmeta train images")
    assert not (tmp_path / "run").exists()


def test_another_backbone_in_the_old_place_is_refused(data: Path, tmp_path: Path) -> None:
    weights = tmp_path / "resnet20.safetensors"
    fmeta.weights.save(weights, fmeta.models.backbone("resnet20").state_dict())
    config = images(data, tmp_path / "run", weights=str(weights))
    assert commands.train(config, "fmeta train images") == 0
    fmeta.load(tmp_path / "run")
    torch.manual_seed(1)
    fmeta.weights.save(weights, fmeta.models.backbone("resnet20").state_dict())
    with pytest.raises(ValueError, match=f"started from other pre-trained weights than {weights} has now"):
        fmeta.load(tmp_path / "run")


def test_reloading_and_resuming_give_the_same_predictions_to_the_bit(
    data: Path, folder: Path, tmp_path: Path
) -> None:
    config = images(data, tmp_path / "stopped")
    first = replace(config, outer=replace(config.outer, outer_steps=2))
    assert commands.train(first, "fmeta train images") == 0
    resumed = build(replace(config, resume=True))
    run(tmp_path / "stopped", resumed)
    assert_trees_equal(load_run(tmp_path / "stopped", "last")[1], load_run(folder, "last")[1])
    fmeta.export(folder, tmp_path / "meta.safetensors", what="meta")
    found = fmeta.weights.read(tmp_path / "meta.safetensors")
    again = build(images(data, tmp_path / "again", weights=str(tmp_path / "meta.safetensors")))
    built, meta = load_run(folder)
    head = {f"head.{part}": found[f"linear.{part}"] for part in ("weight", "bias")}
    reloaded = {**again.params, **head}
    assert_trees_equal(reloaded, meta)
    for experiment, m in ((built, meta), (again, reloaded)):
        scores = fmeta.meta_eval(experiment.algorithm, fmeta.Plan(compile=False))(
            m, experiment.test.sampler(5, 0)
        )
        if experiment is built:
            expected = scores
    assert_trees_equal(scores, expected)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_files_say_what_they_cost(
    folder: Path, tmp_path: Path, dtype: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("fp32", dtype):
        fmeta.export(folder, tmp_path / kind, what="meta", dtype=kind)
    ratio = (tmp_path / dtype).stat().st_size / (tmp_path / "fp32").stat().st_size
    assert 0.5 <= ratio < 0.54  # a small network has many statistics
    record = fmeta.weights.record_of(tmp_path / dtype)
    assert record["dtype"] == dtype and record["config"]["task"]["backbone"] == "resnet20"
    rounding = record["rounding"]
    assert rounding["difference"] == pytest.approx(rounding[dtype] - rounding["fp32"], abs=1e-9)
    assert "difference" in capsys.readouterr().out
    found = fmeta.weights.read(tmp_path / dtype)
    assert found["layer3.2.bn2.running_var"].dtype == torch.float32
    assert found["layer3.2.conv2.weight"].dtype == fmeta.weights.DTYPES[dtype]


def test_an_adapted_model_loads_into_the_original_class(data: Path, folder: Path, tmp_path: Path) -> None:
    where = support_folder(data, tmp_path / "support")
    record = fmeta.export(folder, tmp_path / "adapted", what="adapted", support=where)
    assert record["classes"] == ["c00", "c01", "c02"]
    plain = ResNet20(num_classes=3).eval()
    plain.load_state_dict(fmeta.weights.read(tmp_path / "adapted"), strict=True)
    pool = fmeta.data.image_folder(where, size=16, split=(1, 0, 0)).train
    order = torch.tensor([sorted(pool.names).index(name) for name in pool.names])
    x = pool.x.float() / 255
    built, meta = load_run(folder)
    task = built.config.task
    trunk = pretrained.pieces(task).trunk
    assert trunk is not None
    seen = trunk(x).detach()
    algorithm = build(replace(built.config, inner=replace(built.config.inner, inner_steps=3))).algorithm
    expected = algorithm.predict(meta, Batch(seen, order[pool.y]), seen)  # as many steps as test_steps
    torch.testing.assert_close(plain(normalised(x)), expected, rtol=1e-4, atol=1e-5)


def normalised(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (backbones.MEAN, backbones.STD))
    return (x - mean) / std


def test_a_run_leaves_as_a_program_that_takes_pictures(data: Path, folder: Path, tmp_path: Path) -> None:
    where = support_folder(data, tmp_path / "support")
    file = tmp_path / "program.pt2"
    assert cli.main(["export", str(folder), str(file), "--support", str(where), "--queries", "2"]) == 0
    pool = fmeta.data.image_folder(where, size=16, split=(1, 0, 0)).train
    order = torch.tensor([sorted(pool.names).index(name) for name in pool.names])
    x, y = pool.x.float() / 255, order[pool.y]
    fmeta.export(folder, tmp_path / "adapted", what="adapted", support=where)
    plain = ResNet20(num_classes=3).eval()
    plain.load_state_dict(fmeta.weights.read(tmp_path / "adapted"), strict=True)
    with torch.no_grad():
        torch.save(((x, y, x[:2]), plain(normalised(x[:2]))), f"{file}.in.pt")
    run_alone(file)


def test_a_regression_run_leaves_too(tmp_path: Path) -> None:
    config = tiny_sinusoid(tmp_path / "run")
    run(commands.folder.create(config, "fmeta train sinusoid"), build(config))
    fmeta.export(tmp_path / "run", tmp_path / "wave.pt2", checkpoint="last")
    algorithm, meta, _ = fmeta.load(tmp_path / "run", "last")
    x = torch.linspace(-1, 1, 2)[:, None]
    query = torch.linspace(-2, 2, 4)[:, None]
    loss = fmeta.losses.mse(fmeta.functionalize(fmeta.models.mlp([1, 6, 1]))[0])
    twice = fmeta.adapt(loss, meta, Batch(x, x.sin()), fmeta.sgd(0.01), steps=2)
    expected = algorithm.predict(meta, twice, query)
    torch.save(((x, x.sin(), query), expected.detach()), tmp_path / "wave.pt2.in.pt")
    run_alone(tmp_path / "wave.pt2")
    fmeta.export(tmp_path / "run", tmp_path / "meta", what="meta", dtype="fp16", checkpoint="last")
    assert set(fmeta.weights.read(tmp_path / "meta")) == set(meta)
    with pytest.raises(ValueError, match=r"export: support is a folder of pictures, got a run of sinusoid"):
        fmeta.export(tmp_path / "run", tmp_path / "x", support=tmp_path, checkpoint="last")


@pytest.mark.parametrize(
    ("algorithm", "learns"), [("protomaml", "last-1"), ("metasgd", "norms"), ("maml", "lora-2")]
)
def test_what_is_learned_of_a_backbone(data: Path, tmp_path: Path, algorithm: str, learns: str) -> None:
    config = images(data, tmp_path / "run", algorithm, learns=learns)
    assert commands.train(config, "fmeta train images") == 0
    fmeta.export(tmp_path / "run", tmp_path / "meta", what="meta", dtype="bf16")
    where = support_folder(data, tmp_path / "support")
    fmeta.export(tmp_path / "run", tmp_path / "adapted", what="adapted", support=where)
    ResNet20(num_classes=3).load_state_dict(fmeta.weights.read(tmp_path / "adapted"), strict=True)


def trained(config: Config[Any]) -> None:
    """A run that was not tested."""
    run(commands.folder.create(config, "fmeta train images"), build(config))


def seeded(config: Config[Any], seed: int) -> Config[Any]:
    return replace(config, outer=replace(config.outer, seed=seed))


def predicted(algorithm: fmeta.Algorithm, meta: Any, sampler: Sampler) -> Tensor:
    """What is predicted of one task."""
    task = sampler(0, 0)
    support = Batch(task.support.x[0], task.support.y[0])
    return algorithm.predict(meta, support, task.query.x[0])


@pytest.mark.parametrize("learns", ["norms", "lora-2"])
def test_frozen_weights_that_were_drawn_leave_as_the_run_has_them(
    data: Path, tmp_path: Path, learns: str
) -> None:
    config = seeded(images(data, tmp_path / "run", "protonet", learns=learns), 1)
    trained(config)
    experiment, meta = load_run(tmp_path / "run")
    expected, shown = predicted(experiment.algorithm, meta, experiment.family.test), experiment.family.shown
    assert shown is not None
    fmeta.export(tmp_path / "run", tmp_path / "meta", what="meta")
    embed = fmeta.functionalize(fmeta.models.backbone("resnet20", tmp_path / "meta"))
    found = predicted(fmeta.protonet(embed[0], ways=3), embed[1], shown)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # the half file, and the run that its loss is measured with
    record = fmeta.export(tmp_path / "run", tmp_path / "half", what="meta", dtype="bf16")
    assert abs(record["rounding"]["difference"]) < 0.2
    half = fmeta.functionalize(fmeta.models.backbone("resnet20", tmp_path / "half"))
    held = predicted(fmeta.protonet(half[0], ways=3), half[1], shown)
    other, rounded = exporting.rounded(Source(experiment, meta, exporting.parts_of(experiment)), "bf16")
    measured = predicted(other.algorithm, rounded, other.family.test)
    torch.testing.assert_close(measured, held, rtol=1e-4, atol=1e-4)
    assert (held - found).abs().max() > 1e-3


def test_an_adapted_model_of_drawn_frozen_weights(data: Path, tmp_path: Path) -> None:
    config = seeded(images(data, tmp_path / "run", learns="norms"), 2)
    trained(config)
    check_adapted(data, tmp_path, lambda: ResNet20(num_classes=3), normalised)


def check_adapted(
    data: Path, tmp_path: Path, make: Callable[[], torch.nn.Module], before: Callable[[Tensor], Tensor]
) -> None:
    """The adapted model of a run without a trunk is what the run predicts by after as many steps."""
    where = support_folder(data, tmp_path / "support")
    fmeta.export(tmp_path / "run", tmp_path / "adapted", what="adapted", support=where)
    plain = make().eval()
    plain.load_state_dict(fmeta.weights.read(tmp_path / "adapted"), strict=True)
    pool = fmeta.data.image_folder(where, size=16, split=(1, 0, 0)).train
    order = torch.tensor([sorted(pool.names).index(name) for name in pool.names])
    x = pool.x.float() / 255
    experiment, meta = load_run(tmp_path / "run")
    found = adapt(experiment.algorithm.inner_loop, meta, Batch(x, order[pool.y]), 3)
    expected = experiment.algorithm.predict(meta, found, x)
    torch.testing.assert_close(plain(before(x)), expected, rtol=1e-4, atol=1e-4)


def test_an_adapted_model_with_norms_of_every_step(data: Path, tmp_path: Path) -> None:
    config = images(data, tmp_path / "run", "mamlpp", backbone=None, channels=4)
    config = replace(config, inner=replace(config.inner, annealing=True))
    trained(config)
    assert "per_step" in load_run(tmp_path / "run")[1]
    check_adapted(data, tmp_path, lambda: fmeta.models.conv4(3, 3, 4, "max", "flatten", 16), lambda x: x)


def test_statistics_of_each_batch_leave_as_a_program_only(data: Path, tmp_path: Path) -> None:
    config = images(data, tmp_path / "run", batch_norm="batch")
    trained(config)
    where = support_folder(data, tmp_path / "support")
    said = r"export: an adapted model must normalise by .* \(--batch-norm batch\). Export a program .* frozen"
    with pytest.raises(NotImplementedError, match=said):
        fmeta.export(tmp_path / "run", tmp_path / "x", what="adapted", support=where)
    assert not (tmp_path / "x").exists()
    fmeta.export(tmp_path / "run", tmp_path / "x.pt2", support=where)


def test_another_eps_of_norms_is_told_of(data: Path, tmp_path: Path, capsys: Any) -> None:
    config = images(data, tmp_path / "run", norm_eps=1e-3)
    trained(config)
    where = support_folder(data, tmp_path / "support")
    fmeta.export(tmp_path / "run", tmp_path / "x", what="adapted", support=where)
    assert "Its batch norms have eps=0.001, which weights do not say" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("algorithm", "beside"),
    [
        ("metasgd", "lr.head.bias"),
        ("mamlpp", "lr.head.bias"),
        ("metacurvature", "curvature.head.weight.in"),
        ("learned", "theta."),
        ("r2d2", "log_ridge"),
        ("lrd2", "log_ridge"),
        ("metaoptnet", "scale"),
    ],
)
def test_what_is_learned_beside_the_weights_is_kept_and_marked(
    data: Path, tmp_path: Path, algorithm: str, beside: str
) -> None:
    config = images(data, tmp_path / "run", algorithm)
    trained(config)
    record = fmeta.export(tmp_path / "run", tmp_path / "meta.safetensors", what="meta")
    assert any(name.startswith(beside) for name in record["beside"])
    assert set(record["beside"]) < set(fmeta.weights.read(tmp_path / "meta.safetensors"))
    again = build(images(data, tmp_path / "again", algorithm, weights=str(tmp_path / "meta.safetensors")))
    _, meta = load_run(tmp_path / "run")
    body = {name: x for name, x in meta["params"].items() if name.startswith("body.")}
    assert_trees_equal({name: again.params[name] for name in body}, body)


def test_a_head_without_a_bias_stays_so() -> None:
    task = ImagesTask(backbone="maxvit_t", learns="head", size=224)
    found = pretrained.pieces(task)
    head = pretrained.Headed(found.body, found.width, 3, found.bias).head
    params = {f"head.{name}": p.detach() for name, p in head.named_parameters()}
    tensors = fmeta.weights.state_dict(*pretrained.original(task, found, params))
    with torch.device("meta"):
        plain = torchvision.models.maxvit_t(num_classes=3)
    plain.load_state_dict(tensors, strict=True, assign=True)
    with pytest.raises(
        NotImplementedError, match=r"export: the head of maxvit_t has no bias, but this class"
    ):
        pretrained.original(task, found, params | {"head.bias": torch.zeros(3)})


def test_a_backbone_is_asked_for_on_the_command_line() -> None:
    line = "train images --root x --backbone mobilenet_v2 --weights w.pt --learns last-2 --colour-mean 0.5 0.5 0.5"
    task = cli.parse([*line.split(), "--colour-std", "0.5", "0.5", "0.5", "--norm-eps", "0.001"]).config.task
    assert (task.backbone, task.weights, task.learns, task.norm_eps) == (
        "mobilenet_v2",
        "w.pt",
        "last-2",
        0.001,
    )
    assert task.colour_mean == task.colour_std == (0.5, 0.5, 0.5)
    asked = cli.parse("export run file.safetensors --what adapted --dtype bf16 --support shots".split())
    assert (asked.what, asked.dtype, asked.support) == ("adapted", "bf16", Path("shots"))


def test_head_alone_adapts_on_features(data: Path, tmp_path: Path) -> None:
    built = build(images(data, tmp_path / "run", learns="head"))
    assert list(built.params) == ["head.weight", "head.bias"]
    assert built.family.train(0, 0).support.x.shape == (2, 6, 64)
    turned = build(images(data, tmp_path / "run", learns="head", rotations=True))
    assert turned.family.train(0, 0).support.x.shape == (2, 6, 64)
    assert turned.family.pooled(0, 0).query.x.shape == (1, 2 * 3 * 4, 64)
    same = [e.family.test(0, 0).support for e in (built, turned)]
    assert_trees_equal(*same)
    moved = build(images(data, tmp_path / "run", learns="head", augment=("crop", "flip")))
    once, again = (moved.family.train(0, 0).support.x for _ in range(2))
    assert torch.equal(once, again) and not torch.equal(once, built.family.train(0, 0).support.x)
    assert_trees_equal(moved.family.test(0, 0).support, same[0])
    built = build(images(data, tmp_path / "run", learns="all"))
    assert built.family.train(0, 0).support.x.shape == (2, 6, 3, 16, 16)
    built = build(images(data, tmp_path / "run", learns="layer3.1,layer3.2"))
    assert all(name.startswith(("body.layer3.1.", "body.layer3.2.", "head.")) for name in built.params)


def test_what_cannot_be_exported_is_refused(data: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"export: what must be 'meta' or 'adapted' in any dtype, or 'program' in fp32"
    ):
        fmeta.export(folder, tmp_path / "x", dtype="fp16")
    with pytest.raises(
        ValueError, match=r"export: an adapted model needs pictures to adapt to. Give support=FOLDER"
    ):
        fmeta.export(folder, tmp_path / "x", what="adapted")
    two = support_folder(data, tmp_path / "two", classes=2)
    with pytest.raises(ValueError, match=r"export: .*two must have 3 folders, .* got 2. Add or remove some"):
        fmeta.export(folder, tmp_path / "x", what="adapted", support=two)
    with pytest.raises(
        ValueError, match=r"train: --learns must be all, head, norms, last-N, lora-RANK or names"
    ):
        build(images(data, tmp_path / "run", learns="layer9"))


def test_a_classifier_that_is_no_layer_leaves_as_a_program_only(data: Path, tmp_path: Path) -> None:
    config = images(data, tmp_path / "run", "protonet")
    assert commands.train(config, "fmeta train images") == 0
    where = support_folder(data, tmp_path / "support")
    with pytest.raises(
        NotImplementedError, match=r"export: the adapted model must be weights alone, but protonet"
    ):
        fmeta.export(tmp_path / "run", tmp_path / "x", what="adapted", support=where)
    fmeta.export(tmp_path / "run", tmp_path / "x.pt2", support=where)


def test_a_moved_data_set_and_a_name_that_is_not_there(folder: Path, data: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    data_copy = support_folder(data, moved, classes=12)
    for c in range(12):
        for i in range(2, 6):
            (moved / f"c{c:02}" / f"{i}.png").write_bytes((data / f"c{c:02}" / f"{i}.png").read_bytes())
    fmeta.export(folder, tmp_path / "meta", what="meta", root=data_copy)
    with pytest.raises(ValueError, match=r"export: the data .* there is no file .*gone. Say .* by --root"):
        fmeta.export(folder, tmp_path / "meta", what="meta", root=tmp_path / "gone")
    with pytest.raises(AttributeError, match=r"fmeta: there is no name 'exprot' in it"):
        _ = fmeta.exprot


def test_tasks_of_a_run_stop_by_themselves(tmp_path: Path) -> None:
    config = tiny_few_shot(tmp_path / "run")
    config = replace(config, inner=replace(config.inner, stop_below=0.5, stop_patience=2))
    with pytest.MonkeyPatch.context() as patch:
        from tiny_runs import random_pictures

        patch.setattr(family, "load_pools", lambda task: random_pictures())
        assert commands.train(config, "fmeta train glyphs") == 0


@pytest.mark.parametrize("algorithm", ["anil", "protonet"])
def test_a_run_learns_new_classes_from_folders(
    data: Path, tmp_path: Path, algorithm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data, tmp_path / "pictures")
    config = images(tmp_path / "pictures", tmp_path / "run", algorithm)
    assert commands.train(config, "fmeta train images") == 0
    meta = fmeta.load(tmp_path / "run").meta
    shutil.rmtree(tmp_path / "pictures")  # no picture of the training is needed
    assert_trees_equal(load_picture_classifier(tmp_path / "run").build(3)[1], meta)
    support_folder(data, tmp_path / "few")
    support_folder(data, tmp_path / "new")
    words = ["adapt", str(tmp_path / "run"), "--support", str(tmp_path / "few")]
    out = tmp_path / "said.csv"
    capsys.readouterr()
    assert main([*words, "--query", str(tmp_path / "new"), "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    said = capsys.readouterr().out
    assert len(rows) == 6 and list(rows[0]) == [
        "file",
        "predicted",
        "probability",
        "p(c00)",
        "p(c01)",
        "p(c02)",
    ]
    right = sum(Path(row["file"]).parent.name == row["predicted"] for row in rows)
    assert f"accuracy {100 * right / 6:.1f} %" in said
    assert all(abs(sum(float(row[f"p(c0{c})"]) for c in range(3)) - 1) < 1e-3 for row in rows)
    # one picture, in no folder: no accuracy to say
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "x.png").write_bytes((data / "c01" / "3.png").read_bytes())
    assert main([*words, "--query", str(tmp_path / "one"), "--out", str(out)]) == 0
    assert "accuracy" not in capsys.readouterr().out
    for arguments, message in (
        (words, "a run of images needs something to predict"),
        (
            [*words[:3], str(tmp_path / "one"), "--query", str(tmp_path / "new")],
            "must hold a folder for each class",
        ),
        (
            [*words, "--query", str(tmp_path / "nothing")],
            "must be a folder or a zip file, but there is nothing",
        ),
        ([*words, "--query", str(tmp_path / "empty")], "must be a folder of pictures, got none in it"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert main(arguments) == 1
        assert message in capsys.readouterr().err


def test_only_runs_of_pictures_take_pictures(tmp_path: Path) -> None:
    from tiny_runs import tiny_sinusoid

    from fmeta.train import folder as folders

    folders.create(tiny_sinusoid(tmp_path / "sine"), "fmeta train sinusoid")
    with pytest.raises(
        ValueError, match=r"^adapt: .* must be a run of text, detection or pictures, got one of sinus"
    ):
        load_picture_classifier(tmp_path / "sine")


def test_characters_are_read_light_on_dark() -> None:
    from fmeta.train.pictures.adapting import light_on_dark

    printed = torch.full((1, 4, 4), 255, dtype=torch.uint8)
    printed[0, 1] = 0
    found = light_on_dark(torch.stack([printed, 255 - printed]))
    assert torch.equal(found[0], 255 - printed) and torch.equal(found[1], 255 - printed)
