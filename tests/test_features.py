"""A module cut where learning begins, and pools of what the frozen part makes of every picture."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from helpers import assert_trees_close
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import BasicBlock, ResNet

import fmeta
from fmeta import Batch, Task
from fmeta.data import embedded, features, from_tensors
from fmeta.data.identity import digest_of

EAGER = fmeta.Plan(compile=False)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3),
    "mobilenet": lambda: torchvision.models.MobileNetV2(num_classes=3, width_mult=0.25),
    "convnext": lambda: ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)], num_classes=3),
    "vit": lambda: torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=3),
    "backbone": lambda: fmeta.models.backbone("resnet20", ways=3),
    "sequential": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(3600, 3)
    ),
}
LEARNS: dict[str, Callable[[nn.Module], Any]] = {
    "head": fmeta.models.head_name,
    "last-1": lambda module: fmeta.last_blocks(dict(module.named_parameters()), 1),
    "last-2": lambda module: fmeta.last_blocks(dict(module.named_parameters()), 2),
    "norms": fmeta.norm_names,
    "all": lambda module: "*",
}


def pictures(count: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def learned(module: nn.Module) -> list[str]:
    return [name for name, p in module.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("learns", LEARNS)
@pytest.mark.parametrize("network", NETWORKS)
def test_trunk_and_rest_are_the_module(network: str, learns: str) -> None:
    module = NETWORKS[network]().eval()
    chosen = LEARNS[learns](module)
    names = list(fmeta.select(dict(module.named_parameters()), chosen))
    trunk, rest = fmeta.split(module, chosen)
    between = trunk(pictures())
    outputs = rest(*between) if isinstance(between, tuple) else rest(between)
    torch.testing.assert_close(outputs, module(pictures()))
    assert sorted(learned(rest)) == sorted(names)
    assert not set(names) & {name for name, _ in trunk.named_parameters()}
    assert len(learned(module)) == len(list(module.parameters())), "the module itself must stay as it was"
    assert not any(part.training for half in (trunk, rest) for part in half.modules())
    if learns == "head":
        assert list(dict(rest.named_parameters())) == names  # nothing but the head is left


def test_low_rank_updates_run_behind_the_part_that_is_not_touched() -> None:
    module = fmeta.with_lora(NETWORKS["resnet"](), ["layer4.0.conv2", "fc"], rank=2).eval()
    trunk, rest = fmeta.split(module, "*.lora_*")
    between = trunk(pictures())
    assert isinstance(between, tuple) and len(between) == 2  # the shortcut of the block crosses the cut too
    torch.testing.assert_close(rest(*between), module(pictures()))
    torch.testing.assert_close(rest(between), module(pictures()))
    apply, params = fmeta.functionalize(rest)
    torch.testing.assert_close(apply(params, between), module(pictures()))
    assert learned(rest) == ["layer4.0.conv2.lora_a", "layer4.0.conv2.lora_b", "fc.lora_a", "fc.lora_b"]


def tasks(count: int = 2) -> Task:
    x = torch.stack([pictures(6, seed) for seed in range(2 * count)]).double()
    y = torch.arange(6).remainder(3).expand(count, 6)
    return Task(Batch(x[:count], y), Batch(x[count:], y))


@pytest.mark.parametrize("learns", ["last-1", "norms"])
def test_the_meta_gradient_of_the_rest_is_that_of_the_whole(learns: str) -> None:
    module = NETWORKS["mobilenet"]().double().eval()
    chosen = LEARNS[learns](module)
    trunk, rest = fmeta.split(module, chosen)
    apply, params = fmeta.functionalize(rest)
    inside = lambda batch: batch._replace(x=trunk(batch.x.flatten(0, 1)).unflatten(0, (2, 6)).detach())  # noqa: E731
    cut = fmeta.maml(fmeta.losses.cross_entropy(apply), fmeta.sgd(0.1), steps=2)
    found, _ = fmeta.meta_grad(cut, EAGER)(params, Task(*map(inside, tasks())))
    apply, own = fmeta.freeze(*fmeta.functionalize(module), chosen)
    whole = fmeta.maml(fmeta.losses.cross_entropy(apply), fmeta.sgd(0.1), steps=2)
    expected, _ = fmeta.meta_grad(whole, EAGER)(own, tasks())
    assert_trees_close({n: found[n] for n in expected}, expected, tolerance=1e-9)


def test_what_needs_no_parameters_is_computed_behind_the_cut() -> None:
    module = NETWORKS["backbone"]().eval()
    trunk, rest = fmeta.split(module, ["layer3", "linear"])  # whose shortcut is a slice of the same features
    between = trunk(pictures())
    assert isinstance(between, Tensor) and between.shape == (3, 32, 16, 16)
    torch.testing.assert_close(rest(between), module(pictures()))


class Reads(nn.Module):
    """A forward that torch.fx cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) if x.sum() > 0 else x


class Sizes(nn.Module):
    """A learned part that reads a size."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        return self.head(self.body(x)).view(n, 2)


def test_sizes_are_read_again_behind_the_cut() -> None:
    module = Sizes().eval()
    trunk, rest = fmeta.split(module, "head")
    for count in (3, 5):  # features of other batches than the one that the trunk saw last
        x = torch.rand(count, 4)
        torch.testing.assert_close(rest(*trunk(x)), module(x))


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match=r"split: the forward of Reads must be one that torch.fx can follow"):
        fmeta.split(Reads(), "head")
    with pytest.raises(ValueError, match=r"select: 'hed' matches no parameter"):
        fmeta.split(Sizes(), "hed")


def test_a_part_that_cannot_be_followed_may_be_frozen_as_a_whole() -> None:
    module = nn.Sequential(Reads(), nn.Linear(2, 3)).eval()
    trunk, rest = fmeta.split(module, "1")
    x = torch.rand(2, 4)
    torch.testing.assert_close(rest(trunk(x)), module(x))


def pools() -> fmeta.data.Pools:
    x = torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return from_tensors(x, torch.arange(60) % 6, split=(0.5, 0.5, 0.0))


def trunk(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()).eval()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMETA_CACHE", str(tmp_path / "cache"))


def test_features_of_a_pool_are_those_of_each_picture() -> None:
    own = pools()
    found = embedded(own.train, trunk(), batch_size=7)
    expected = trunk()(own.train.x.float() / 255).detach()
    torch.testing.assert_close(found.x, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.y, own.train.y) and found.names == own.train.names
    sizes = {"ways": 2, "shots": 1, "queries": 2, "tasks": 3}
    small = fmeta.tasks.few_shot(found, **sizes)(0, 0)
    plain = fmeta.tasks.few_shot(own.train, **sizes)(0, 0)
    assert torch.equal(small.query.y, plain.query.y)
    torch.testing.assert_close(small.query.x[1], trunk()(plain.query.x[1]).detach(), rtol=1e-5, atol=1e-6)


def test_tasks_may_go_through_the_trunk_as_they_are_drawn() -> None:
    sizes = {"ways": 2, "shots": 1, "queries": 2, "tasks": 3}
    own = pools().train
    task = fmeta.tasks.through(fmeta.tasks.few_shot(own, **sizes), trunk())(0, 0)
    kept = fmeta.tasks.few_shot(embedded(own, trunk()), **sizes)(0, 0)
    assert_trees_close(task, kept, tolerance=1e-5)
    assert not task.support.x.requires_grad
    turned = fmeta.tasks.through(fmeta.tasks.few_shot(own, **sizes, augment="rotations"), trunk())(0, 0)
    assert turned.query.x.shape == (3, 4, 144)
    with pytest.raises(TypeError, match=r"through: trunk must be an nn.Module, got builtin_function"):
        fmeta.tasks.through(fmeta.tasks.few_shot(own, **sizes), torch.relu)  # type: ignore[arg-type]


def test_all_splits_at_once() -> None:
    found = embedded(pools(), trunk())
    torch.testing.assert_close(found.val.x, embedded(pools().val, trunk()).x)
    assert len(found.test.names) == 0


def test_features_are_kept_until_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    plain = features.computed
    monkeypatch.setattr(features, "computed", lambda *args: (runs.append(1), plain(*args))[1])
    own = pools().train
    first = embedded(own, trunk()).x
    assert torch.equal(embedded(own, trunk()).x, first) and len(runs) == 1
    embedded(own, trunk(seed=1))  # other weights
    other = trunk()
    other[1].running_mean += 1.0  # type: ignore[operator, index]
    embedded(own, other)  # other statistics
    changed = fmeta.data.Pool(own.x + 1, own.y, own.names, own.rows, own.counts)
    embedded(changed, trunk())
    eps = trunk()
    eps[1].eps = 0.1  # type: ignore[index]
    embedded(own, eps)
    assert len(runs) == 5


@pytest.mark.parametrize(
    ("wrong", "kind", "said"),
    [
        (lambda: trunk().train(), ValueError, "BatchNorm2d at '1' is in training mode"),
        (lambda: nn.Sequential(nn.Dropout(), nn.Flatten()), ValueError, "Dropout at '0' is in training mode. Call"),
        (lambda: fmeta.models.resnet12(3, None).eval(), ValueError, "normalises by the batch. Use a trunk with"),
        (lambda: torch.relu, TypeError, "embedded: trunk must be an nn.Module, got builtin_function"),
        (lambda: Pair().eval(), TypeError, "embedded: trunk must return one tensor of features, got tuple"),
        (lambda: Drops(), ValueError, "Drops at 'the top' is in training mode. Call"),
        (lambda: nn.Sequential(nn.Flatten(), nn.RReLU()), ValueError, "RReLU at '1' is in training mode"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 2), Drops()), ValueError, "Drops at '2' is in training"),
    ],
)  # fmt: skip
def test_trunks_that_give_no_features_are_refused(wrong: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        embedded(pools().train, wrong())
    with pytest.raises(ValueError, match=r"embedded: batch_size must be at least 1, got 0"):
        embedded(pools().train, trunk(), batch_size=0)


def test_layers_that_do_not_look_at_their_mode_may_be_in_training_mode() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.LayerNorm(36)
    )
    expected = net(pools().train.x.float() / 255)
    torch.testing.assert_close(embedded(pools().train, net).x, expected.detach())


class Drops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x.flatten(1), 0.5, self.training)


class Times(nn.Module):
    """A module whose options are plain attributes."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        vars(self).update(options)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


OPTIONS: list[Any] = [
    1.0, 100.0, 1, True, None, "1", (1, 2), [1, 2], {"k": (1, 2)}, {"k": (1, 3)}, torch.Size([1]), torch.float16,
    torch.float64, torch.ones(2), torch.zeros(2), torch.relu, torch.tanh, nn.functional.gelu, nn.functional.silu,
    lambda x: 2 * x, lambda x: 3 * x, partial(torch.add, 2), partial(torch.add, 3), [nn.Tanh()], [nn.Sigmoid()],
]  # fmt: skip


def test_options_of_a_trunk_are_in_its_key() -> None:
    found = [digest_of(nn.Sequential(Times(k=option))) for option in OPTIONS]
    found += [digest_of(fmeta.with_lora(trunk_of_one(), "*", alpha=alpha)) for alpha in (1.0, 50.0)]
    assert len(set(found)) == len(found)
    again = [digest_of(nn.Sequential(Times(k=copy.deepcopy(option)))) for option in OPTIONS]
    assert again == found[: len(OPTIONS)]


def trunk_of_one() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))


class Scaled(Times):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) * self.k


def test_a_trunk_with_other_options_has_other_features() -> None:
    one, many = (embedded(pools().train, Scaled(k=k).eval()).x for k in (1.0, 100.0))
    torch.testing.assert_close(many, 100 * one)


class Shifted(nn.Linear):
    """A linear layer that computes more than its weights say."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_transformers_of_torch_call_the_layers_that_they_hold() -> None:
    own = from_tensors(torch.randn(8, 5, 8), torch.arange(8) % 2, split=(1, 0, 0)).train
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    net.linear1 = Shifted(8, 16).eval()
    expected = net(own.x).detach()  # with gradients there is no fast path
    torch.testing.assert_close(embedded(own, net).x, expected)
    sampler = fmeta.tasks.few_shot(own, ways=2, shots=1, queries=1, tasks=2)
    task, plain = fmeta.tasks.through(sampler, net)(0, 0), sampler(0, 0)
    torch.testing.assert_close(task.query.x[0], net(plain.query.x[0]).detach())
    assert torch.backends.mha.get_fastpath_enabled()


def test_pools_of_several_tensors_are_refused() -> None:
    tree: Any = {"input_ids": torch.ones(4, 3), "attention_mask": torch.ones(4, 3)}
    own = pools()
    parts = [replace(part, x=tree) for part in (own.train, own.val, own.test)]
    for given in (parts[0], fmeta.data.Pools(*parts)):
        with pytest.raises(TypeError, match=r"embedded: pool.x must be one tensor, got dict. For texts"):
            embedded(given, trunk())


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x
