"""Detection: the cut detector and its loss against torchvision's, meta-gradients against loops, new classes."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
from detection_problems import (
    HEAD,
    LOOP,
    problem,
    tiny_detector,
    tiny_module,
    tiny_scenes,
    with_features,
)
from helpers import assert_trees_close
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

import fmeta
from fmeta import Batch, Plan, Task
from fmeta.data import Featured
from fmeta.models import new_classes
from fmeta.models.detecting import objects
from fmeta.tasks.detection import batch_of, detection, make_task, pictures_of_step
from fmeta.types import Params

STEPS = 2
RATE = 0.05


def tasks(count: int = 2, **options: Any) -> tuple[Any, Params, list[Task]]:
    loss_fn, params, source = problem()
    sizes = {"ways": 2, "shots": 2, "queries": 1, "steps": STEPS, "batch": 2} | options
    return loss_fn, params, detection(source, tasks=count, **sizes)(0, 0)


# The detector in two parts


@pytest.mark.parametrize("cut", ["backbone", "body"])
def test_the_cut_detector_finds_what_torchvision_finds(cut: Any) -> None:
    module, pool = tiny_module(), tiny_scenes(3)
    pool.images[1, :, 40:] = 0
    pool.sizes[1, 0] = 40
    detector, params = fmeta.models.split_detector(module, cut=cut)
    detector.module.roi_heads.score_thresh = module.roi_heads.score_thresh = 0.0
    images = pool.images.double() / 255
    x = {"features": detector.features(images, pool.sizes), "sizes": pool.sizes}
    found = fmeta.models.detection(detector).predict(params, x)
    seen = module.transform.normalize(images)
    seen[1, :, 40:] = 0  # torchvision pads after it has normalised
    sizes = [(64, 64), (40, 64), (64, 64)]
    with torch.no_grad():
        maps = module.backbone(seen)
        proposals, _ = module.rpn(ImageList(seen, sizes), maps)
        expected, _ = module.roi_heads(maps, proposals, sizes)
    for one, other in zip(found, expected, strict=True):
        assert len(other["boxes"]) > 0
        assert_trees_close(one, {name: other[name] for name in one})


def test_weights_go_back_into_the_module() -> None:
    module = tiny_module(classes=3)
    detector, params = fmeta.models.split_detector(module, cut="body")
    again = fmeta.models.merged_detector(detector, params)
    assert_trees_close(dict(again.state_dict()), dict(module.state_dict()))
    agnostic = new_classes.object_detector(params)
    merged = fmeta.models.merged_detector(detector, agnostic).state_dict()
    assert merged[f"{HEAD}.cls_score.bias"].shape == (2,)
    assert_trees_close(merged[f"{HEAD}.bbox_pred.weight"][4:], agnostic[f"{HEAD}.bbox_pred.weight"])


def torchvision_losses(module: Any, params: Params, batch: Batch) -> dict[str, Tensor]:
    """The four losses of torchvision's own modules in training mode, on the same features."""
    names = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in params.items():
            names[name].copy_(value)
    module.rpn.train(), module.roi_heads.train()
    sizes = [tuple(size) for size in batch.x["sizes"].tolist()]
    boxes, labels = objects(batch.y)
    targets = [{"boxes": box, "labels": label} for box, label in zip(boxes, labels, strict=True)]
    maps = OrderedDict(batch.x["features"])
    proposals, first = module.rpn(ImageList(torch.empty(1, 1, 64, 64), sizes), maps, targets)
    # torchvision's heads train on float32 targets only
    targets = [{"boxes": target["boxes"], "labels": target["labels"]} for target in targets]
    _, second = module.roi_heads(maps, proposals, sizes, targets)
    return first | second


def set_samplers(module: Any, size: int, part: float) -> None:
    for sampler in (module.rpn.fg_bg_sampler, module.roi_heads.fg_bg_sampler):
        sampler.batch_size_per_image, sampler.positive_fraction = size, part


def loss_beside_torchvision(size: int, part: float) -> tuple[Any, Any, Params, Batch]:
    module, pool = tiny_module(classes=3), tiny_scenes(4)
    pool.labels[3] = 0  # a picture without objects
    set_samplers(module, size, part)
    detector, params = fmeta.models.split_detector(module)
    source = with_features(detector, pool)
    x, y = batch_of(source, torch.tensor([1, 2, 3]), torch.arange(4))
    features = {name: level.double() for name, level in x["features"].items()}
    batch = Batch({**x, "features": features}, {**y, "boxes": y["boxes"].double()})
    return module, fmeta.models.detection(detector), params, batch


def test_losses_and_gradients_are_torchvisions_where_it_draws_all() -> None:
    module, loss_fn, params, batch = loss_beside_torchvision(size=10**6, part=1.0)
    inputs = {name: value.clone().requires_grad_() for name, value in params.items()}
    loss, metrics = loss_fn(inputs, batch)
    expected = torchvision_losses(module, params, batch)
    # torchvision computes the first of them in single precision
    assert_trees_close(metrics, {name: expected[name].detach().double() for name in metrics}, tolerance=1e-6)
    loss.backward()
    sum(expected.values()).backward()
    names = dict(module.named_parameters())
    for name, leaf in inputs.items():
        assert leaf.grad is not None and names[name].grad is not None
        assert_trees_close(leaf.grad, names[name].grad, tolerance=1e-6)


def test_the_loss_is_the_mean_over_torchvisions_draws() -> None:
    module, loss_fn, params, batch = loss_beside_torchvision(size=8, part=0.25)
    _, metrics = loss_fn(params, batch)
    with torch.no_grad():
        draws = [torchvision_losses(module, params, batch) for _ in range(400)]
    for name, value in metrics.items():
        values = torch.stack([draw[name] for draw in draws])
        assert values.std() > 1e-4, name
        error = 4 * values.std() / math.sqrt(len(values)) + 1e-9
        assert abs(values.mean() - value) < error, name


def test_the_loss_is_pure() -> None:
    loss_fn, params, batches = tasks(1)
    state = torch.get_rng_state()
    task = batches[0]
    two = fmeta.few_shot_detection(loss_fn, fmeta.sgd(0.0), steps=0)
    meta = two.init(params)
    results = [two.loss(meta, task)[0] for _ in range(2)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(torch.get_rng_state(), state)


# New classes


def test_classes_start_as_the_object_split_evenly() -> None:
    _, params = tiny_detector()
    params = new_classes.object_detector(params)
    rows = new_classes.class_rows(params, 3)
    h = torch.rand(5, 8).double()
    score = lambda p: h @ p[f"{HEAD}.cls_score.weight"].mT + p[f"{HEAD}.cls_score.bias"]  # noqa: E731
    before, after = score(params).softmax(1), score(rows).softmax(1)
    assert_trees_close(after[:, 0], before[:, 0])
    assert_trees_close(after[:, 1:], before[:, 1:].expand(5, 3) / 3)


def test_prototypes_follow_their_formula() -> None:
    loss_fn, params, batches = tasks(1)
    support = pictures_of_step(batches[0].support, torch.tensor(0))
    support = Batch({k: v for k, v in batches[0].support.x.items() if k != "order"}, batches[0].support.y)
    boxes, labels = objects(support.y)
    maps = OrderedDict(support.x["features"])
    h, kinds = loss_fn.embed(params, maps, (64, 64), boxes), torch.cat(labels)
    means = torch.stack([h[kinds == kind].mean(0) for kind in (1, 2)])
    m = means.mean(0)
    v = torch.stack([(h[kinds == kind] - m).square().sum(1).mean() for kind in (1, 2)]).mean()
    algorithm = fmeta.few_shot_detection(loss_fn, fmeta.sgd(0.1), steps=0)
    meta = algorithm.init(params)
    start = algorithm.inner_loop.start(meta, support)
    w, b = (params[f"{HEAD}.cls_score.{kind}"][1] for kind in ("weight", "bias"))
    for index in range(2):
        q = means[index] - m
        expected = h @ w + b + 8.0 * (h @ q - m @ q - q @ q / 2) / v - math.log(2)
        row = start[f"{HEAD}.cls_score.weight"][index + 1]
        assert_trees_close(h @ row + start[f"{HEAD}.cls_score.bias"][index + 1], expected)


# Meta-gradients, by the loop plan and written out


def adapted_by_hand(loss_fn: Any, meta: Any, task: Task, names: list[str], exact: bool) -> Params:
    """The start and the inner steps on torch.autograd alone."""
    whole = Batch({k: v for k, v in task.support.x.items() if k != "order"}, task.support.y)
    start = fmeta.few_shot_detection(loss_fn, fmeta.sgd(RATE), steps=0).inner_loop.start(meta, whole)
    # clones: what adapts is no part of the path through the prototypes
    params = {name: start.get(name, meta["params"][name]).clone() for name in names}
    for k in range(STEPS):
        rows = task.support.x["order"][k]
        x = {
            "features": {name: level[rows] for name, level in task.support.x["features"].items()},
            "sizes": task.support.x["sizes"][rows],
        }
        batch = Batch(x, {name: part[rows] for name, part in task.support.y.items()})
        loss, _ = loss_fn({**meta["params"], **params}, batch)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=exact, retain_graph=True)
        params = {name: p - RATE * g for (name, p), g in zip(params.items(), grads, strict=True)}
    return params


def as_leaves(meta: Any) -> Any:
    return {
        "params": {name: value.clone().requires_grad_() for name, value in meta["params"].items()},
        "strength": meta["strength"].clone().requires_grad_(),
    }


ADAPTS = {"heads": ("rpn", "roi_heads"), "last layer": (HEAD,)}


@pytest.mark.parametrize("adapts", ADAPTS)
@pytest.mark.parametrize("rule", ["first order", "exact", "reptile"])
def test_meta_gradients_are_those_of_a_loop_written_out(adapts: str, rule: str) -> None:
    loss_fn, params, batches = tasks()
    options: dict[str, Any] = {"adapts": ADAPTS[adapts]}
    options |= {"adjoint": fmeta.unroll()} if rule == "exact" else {}
    options |= {"objective": "reptile"} if rule == "reptile" else {}
    algorithm = fmeta.few_shot_detection(loss_fn, fmeta.sgd(RATE), steps=STEPS, **options)
    meta = algorithm.init(params)
    grads, metrics = fmeta.meta_grad(algorithm, LOOP)(meta, batches)
    leaves = as_leaves(meta)
    names = [name for name in params if name.startswith(ADAPTS[adapts])]
    total, losses = torch.zeros(()).double(), []
    for task in batches:
        ended = adapted_by_hand(loss_fn, leaves, task, names, rule == "exact")
        loss, _ = loss_fn({**leaves["params"], **ended}, task.query)
        losses.append(loss.detach())
        if rule == "reptile":
            whole = Batch({k: v for k, v in task.support.x.items() if k != "order"}, task.support.y)
            start = fmeta.few_shot_detection(loss_fn, fmeta.sgd(RATE), steps=0).inner_loop.start(
                leaves, whole
            )
            began = {name: start.get(name, leaves["params"][name]) for name in names}
            loss = sum(
                (0.5 * (began[name] - ended[name].detach()).square().sum() for name in names), total * 0
            )
        total = total + loss / len(batches)
    flat = [*leaves["params"].values(), leaves["strength"]]
    expected = torch.autograd.grad(total, flat, allow_unused=True, materialize_grads=True)
    found = [*grads["params"].values(), grads["strength"]]
    assert any(bool(g.abs().max() > 0) for g in found)
    for one, other in zip(found, expected, strict=True):
        assert_trees_close(one, other)
    assert_trees_close(metrics["loss"], torch.stack(losses).mean())


def test_the_pyramid_is_meta_learned_to_first_order() -> None:
    loss_fn, params, source = problem("body")
    task = detection(source, ways=2, shots=2, queries=1, tasks=1)(0, 0)[0]
    algorithm = fmeta.few_shot_detection(loss_fn, fmeta.sgd(RATE), steps=1)
    grads, metrics = fmeta.meta_grad(algorithm, LOOP)(algorithm.init(params), [task])
    assert metrics["finite"]
    assert grads["params"]["backbone.fpn.inner_blocks.0.0.weight"].abs().max() > 0


def test_tasks_of_different_shapes_in_one_step() -> None:
    loss_fn, params, source = problem()
    sampler = detection(source, ways=(2, 3), shots=1, queries=1, tasks=4)
    batch = sampler(0, 1)
    assert len({int(task.support.y["labels"].max()) for task in batch}) == 2
    algorithm = fmeta.few_shot_detection(loss_fn, fmeta.sgd(RATE), steps=1)
    outer = fmeta.adam(1e-2)
    state = fmeta.meta_init(algorithm, outer, params)
    step = fmeta.meta_step(algorithm, outer, LOOP)
    first = None
    for _ in range(15):
        state, metrics = step(state, batch)
        first = metrics["loss"] if first is None else first
    assert metrics["finite"] and metrics["loss"] < 0.8 * first
    curves = fmeta.meta_eval(algorithm, LOOP, steps=[0, 1, 3])(state.meta, batch)["loss"]
    assert curves.shape == (4, 3) and bool((curves.mean(0)[1:] < curves.mean(0)[0]).all())


# What is refused


@pytest.mark.parametrize("plan", [Plan(), Plan(engine="nested"), Plan(tasks="loop")], ids=str)
def test_vmap_is_refused_by_name(plan: Plan) -> None:
    loss_fn, params, batches = tasks(1)
    algorithm = fmeta.few_shot_detection(loss_fn, fmeta.sgd(RATE), steps=1)
    stacked: Any = batches
    if plan.tasks == "vmap":
        from fmeta import tree

        stacked = tree.stack([batches[0], batches[0]])
    message = r'cannot be batched over tasks.* Plan\(engine="autograd", tasks="loop"\)'
    with pytest.raises(ValueError, match=message):
        fmeta.meta_grad(algorithm, plan)(algorithm.init(params), stacked)


def test_labels_that_the_support_set_lacks() -> None:
    loss_fn, params, source = problem()
    algorithm = fmeta.few_shot_detection(loss_fn, fmeta.sgd(RATE), steps=1)
    meta, grad = algorithm.init(params), fmeta.meta_grad(algorithm, LOOP)
    rows = torch.arange(16)
    shown = source.pool.holds()
    task = make_task(source, torch.tensor([1, 2]), rows[shown[:, 0]], rows[shown[:, 1]])
    without = {
        **task.support.y,
        "labels": torch.where(task.support.y["labels"] == 2, 0, task.support.y["labels"]),
    }
    with pytest.raises(ValueError, match=r"support set only, got class 2 where that has 1 .. 1"):
        grad(meta, [task._replace(support=task.support._replace(y=without))])
    gaps = {**task.support.y, "labels": torch.where(task.support.y["labels"] == 1, 0, 2)}
    with pytest.raises(ValueError, match=r"1 .. 2 without gaps, got no box of class 1"):
        grad(meta, [task._replace(support=task.support._replace(y=gaps))])
    none = {**task.support.y, "labels": torch.zeros_like(task.support.y["labels"])}
    with pytest.raises(ValueError, match="must show objects, got pictures without a box"):
        grad(meta, [task._replace(support=task.support._replace(y=none))])


def test_other_heads_and_other_modules_are_refused() -> None:
    detector, params = tiny_detector()
    loss_fn = fmeta.models.detection(detector)
    algorithm = fmeta.few_shot_detection(loss_fn, fmeta.sgd(0.1), steps=1)
    for wrong in (params, None):
        with pytest.raises(ValueError, match="params must be the heads of a detector of objects"):
            algorithm.init(wrong)
    with pytest.raises(ValueError, match="proposals must be at least 1, got 0"):
        fmeta.models.detection(detector, proposals=0)
    with pytest.raises(
        TypeError, match=r"module must have backbone, rpn, roi_heads, transform .* got Linear"
    ):
        fmeta.models.split_detector(torch.nn.Linear(1, 1))
    module = tiny_module()
    module.roi_heads.has_mask = lambda: True
    with pytest.raises(TypeError, match="masks and key points are not supported"):
        fmeta.models.split_detector(module)
    module = tiny_module()
    module.backbone = torch.nn.Sequential(module.backbone)
    with pytest.raises(ValueError, match="cut='body' needs a backbone with a feature pyramid"):
        fmeta.models.split_detector(module, cut="body")
    with pytest.raises(AttributeError, match=r"fmeta.models: there is no 'nothing'"):
        fmeta.models.nothing  # noqa: B018
    with pytest.raises(ValueError, match=r"name must be one of fasterrcnn_.* got 'retina'"):
        fmeta.models.faster_rcnn("retina")


def test_backbone_weights_of_another_architecture(tmp_path: Any) -> None:
    small, large = (tiny_module(width=width).backbone.body for width in (0.1, 0.35))
    weights = {f"features.{name}": value.float() for name, value in small.state_dict().items()}
    with pytest.raises(ValueError, match=r"must be a file of weights .* reading it failed"):
        fmeta.models.mobilenet_detector(1, weights=tmp_path / "none.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="must hold a dict of tensors, got list"):
        fmeta.models.mobilenet_detector(1, weights=tmp_path / "list.pt", width=0.1)
    torch.save(weights, tmp_path / "short.pt")
    with pytest.raises(ValueError, match=r"another architecture, got no features.18"):
        fmeta.models.mobilenet_detector(1, weights=tmp_path / "short.pt", width=0.1)
    import torchvision

    network = torchvision.models.mobilenet_v2(width_mult=0.35)
    torch.save(network.state_dict(), tmp_path / "wide.pt")
    with pytest.raises(ValueError, match=r"another architecture, got features.0.0.weight of shape"):
        fmeta.models.mobilenet_detector(1, weights=tmp_path / "wide.pt", width=0.1)
    module = fmeta.models.mobilenet_detector(1, weights=tmp_path / "wide.pt", width=0.35)
    assert_trees_close(module.backbone.body["0"][0].weight, network.features[0][0].weight)
    assert len(list(large.parameters())) == len(list(small.parameters()))


def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def refuse(name: str, **options: Any) -> Any:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models, "get_model", refuse)
    with pytest.raises(ValueError, match=r"must be downloaded, but that failed .no route to host"):
        fmeta.models.faster_rcnn()


def test_a_pool_is_cut_by_the_whole_of_torchvisions_own_detectors() -> None:
    module = fmeta.models.faster_rcnn(weights=None, num_classes=3)
    detector, params = fmeta.models.split_detector(module)
    pool = tiny_scenes(2)
    source = Featured(pool, detector.features(pool.images, pool.sizes))
    x, y = batch_of(source, torch.tensor([1, 2, 3]), torch.arange(2))
    loss_fn = fmeta.models.detection(detector, proposals=4)
    algorithm = fmeta.few_shot_detection(loss_fn, fmeta.sgd(0.01), steps=1)
    meta = algorithm.init(new_classes.object_detector(params))
    labels = y["labels"].clamp_max(1)
    batch = Batch(x, {**y, "labels": labels})
    _, metrics = fmeta.meta_grad(algorithm, LOOP)(meta, [Task(batch, batch)])
    assert metrics["finite"] and len(detector.strides) == len(x["features"])
