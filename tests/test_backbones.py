"""Models of torchvision with a head of one's own: names, colours, weights from files and downloads, derivatives."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from helpers import assert_trees_close, assert_trees_differ, assert_trees_equal
from torch import Tensor, nn

import fmeta
from fmeta import Batch, Plan, Task
from fmeta.models import backbones


def pictures(count: int = 2, size: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def with_statistics(module: nn.Module) -> nn.Module:
    """Running statistics that differ from those of a new module."""
    generator = torch.Generator().manual_seed(3)
    for name, x in module.named_buffers():
        if "running" in name:
            x.copy_(0.5 + torch.rand(x.shape, generator=generator))
    return module


def test_it_is_the_model_of_torchvision_on_normalised_colours() -> None:
    module = with_statistics(fmeta.models.backbone("resnet18", ways=5))
    plain = torchvision.models.resnet18(num_classes=5).eval()
    plain.load_state_dict(module.state_dict(), strict=True)
    assert isinstance(module, torchvision.models.ResNet) and not module.training
    assert fmeta.models.head_name(module) == "fc"
    x = pictures()
    mean, std = (torch.tensor(v)[:, None, None] for v in (backbones.MEAN, backbones.STD))
    torch.testing.assert_close(module(x), plain((x - mean) / std))
    grey = x[:, :1]
    torch.testing.assert_close(module(grey), module(grey.expand(-1, 3, -1, -1)))
    apply, params = fmeta.functionalize(module)
    assert list(params) == [name for name, _ in plain.named_parameters()]
    torch.testing.assert_close(apply(params, x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "head", "width"), [("mobilenet_v2", "classifier.1", 1280), ("resnet20", "linear", 64)]
)
def test_without_ways_it_is_an_embedding(name: str, head: str, width: int) -> None:
    module = fmeta.models.backbone(name)
    assert module(pictures()).shape == (2, width)
    assert not [n for n, _ in module.named_parameters() if n.startswith(head)]
    module = fmeta.models.backbone(name, ways=7)
    assert fmeta.models.head_name(module) == head
    assert module(pictures()).shape == (2, 7)


def test_a_file_of_weights_and_its_head(tmp_path: Path) -> None:
    source = with_statistics(fmeta.models.backbone("resnet20"))
    whole = fmeta.models.backbone("resnet20", ways=10)
    whole.load_state_dict(whole.state_dict() | source.state_dict())
    path = tmp_path / "weights.safetensors"
    fmeta.weights.save(path, whole.state_dict())
    x = pictures()
    kept = fmeta.models.backbone("resnet20", path, ways=10)
    torch.testing.assert_close(kept(x), whole(x))
    fresh = fmeta.models.backbone("resnet20", str(path), ways=3)
    assert fresh(x).shape == (2, 3)
    assert_trees_close(dict(fresh.layer3.state_dict()), dict(whole.layer3.state_dict()), tolerance=0.0)
    torch.testing.assert_close(fmeta.models.backbone("resnet20", path)(x), source(x))


def test_a_head_of_as_many_outputs_as_asked_for_is_kept(tmp_path: Path) -> None:
    whole = fmeta.models.backbone("resnet20", ways=3)
    fmeta.weights.save(tmp_path / "three", whole.state_dict())
    x = pictures()
    torch.testing.assert_close(fmeta.models.backbone("resnet20", tmp_path / "three", ways=3)(x), whole(x))
    other = fmeta.models.backbone("resnet20", tmp_path / "three", ways=4)
    assert other(x).shape == (2, 4)
    embed = fmeta.models.backbone("resnet20", tmp_path / "three")
    torch.testing.assert_close(embed(x) @ whole.linear.weight.mT + whole.linear.bias, whole(x))


@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "maxvit_t", "vit_b_16", "densenet121"])
def test_its_state_dict_is_that_of_the_original_with_as_many_classes(name: str) -> None:
    with torch.device("meta"):  # names and shapes
        options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        plain = torchvision.models.get_model(name, weights=None, num_classes=5, **options)
        own = fmeta.models.backbone(name, ways=5).state_dict()
    shapes = {n: x.shape for n, x in own.items()}
    assert shapes == {n: x.shape for n, x in plain.state_dict().items()}


def test_a_file_for_a_model_of_several_classifiers(tmp_path: Path) -> None:
    whole = fmeta.models.backbone("googlenet", ways=3)
    fmeta.weights.save(tmp_path / "three", whole.state_dict())
    again = fmeta.models.backbone("googlenet", tmp_path / "three", ways=3)
    assert_trees_close(dict(again.state_dict()), dict(whole.state_dict()), tolerance=0.0)
    for ways in (None, 4):
        other = fmeta.models.backbone("googlenet", tmp_path / "three", ways=ways)
        assert torch.equal(other.aux1.fc1.weight, whole.aux1.fc1.weight)


def test_weights_of_other_libraries() -> None:
    module = fmeta.models.backbone("mobilenet_v2", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), norm_eps=1e-3)
    assert {m.eps for m in module.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
    assert torch.equal((module.colour_mean / module.colour_std).flatten(), torch.ones(3))


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    fmeta.weights.save(path, fmeta.models.backbone("resnet20", ways=10).state_dict())
    with pytest.raises(
        ValueError,
        match=r"weights.load: the weights of .*weights.safetensors must be those of ResNet, .*missing: ",
    ):
        fmeta.models.backbone("resnet18", path)


def test_default_weights_come_with_their_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(url: str, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        asked.append(url)
        return torchvision.models.resnet18().state_dict()

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", answer)
    for wanted in ("default", "imagenet1k_v1", torchvision.models.ResNet18_Weights.DEFAULT):
        module = fmeta.models.backbone("resnet18", wanted, ways=4)
        assert module.fc.out_features == 4
    assert len(asked) == 3 and all("resnet18" in url for url in asked)
    with pytest.raises(
        ValueError, match=r"'default' or one of IMAGENET1K_V1, DEFAULT|one of IMAGENET1K_V1, got 'best'"
    ):
        fmeta.models.backbone("resnet18", "best")
    with pytest.raises(ValueError, match=r"weights of resnet20 must be a file or None, got 'default'"):
        fmeta.models.backbone("resnet20", "default")


def test_published_inception_networks_see_the_colours_they_were_trained_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Their first layer is preceded by a change of colours, which torchvision turns on with published weights."""
    published = torchvision.models.googlenet(init_weights=False).state_dict()
    monkeypatch.setattr(
        torchvision.models._api, "load_state_dict_from_url", lambda *args, **kwargs: published
    )
    wanted = torchvision.models.googlenet(weights="DEFAULT").eval()
    module = fmeta.models.backbone("googlenet", "default", ways=1000)
    x = torch.rand(1, 3, 64, 64)
    seen = torchvision.transforms.functional.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        assert_trees_close([module(x)], [wanted(seen)])
    path = tmp_path / "googlenet.safetensors"
    safetensors.torch.save_file(published, path)
    again = fmeta.models.backbone("googlenet", path, ways=1000)
    with torch.no_grad():
        assert_trees_equal([module(x)], [again(x)])


def test_a_download_that_fails_says_how_to_give_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fail)
    said = r"backbone: the weights of resnet18 could not be downloaded from https://.* \(.*no route.* give its path"
    with pytest.raises(ValueError, match=said):
        fmeta.models.backbone("resnet18", "default")


def test_unknown_names_say_near_ones() -> None:
    with pytest.raises(ValueError, match=r"got 'resnet81'. Near ones are .*resnet18"):
        fmeta.models.backbone("resnet81")
    with pytest.raises(ValueError, match=r"got 'qqq'. fmeta.models.backbones.names\(\) lists them"):
        fmeta.models.backbone("qqq")
    with pytest.raises(
        NotImplementedError, match=r"backbone: a model whose last layer is nn.Linear was expected"
    ):
        fmeta.models.backbone("squeezenet1_1")


def reference_resnet20(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network for CIFAR from its weights, written once more."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = p[f"{name}.running_mean"], p[f"{name}.running_var"]
        scaled = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        return scaled * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]

    x = norm(F.conv2d(x, p["conv1.weight"], padding=1), "bn1").relu()
    for stage in (1, 2, 3):
        for block in (0, 1, 2):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = norm(F.conv2d(x, p[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1").relu()
            y = norm(F.conv2d(y, p[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if stride == 2:
                x = x[:, :, ::2, ::2]
                zeros = torch.zeros_like(x[:, : (y.shape[1] - x.shape[1]) // 2])
                x = torch.cat([zeros, x, zeros], 1)
            x = (x + y).relu()
    return x.mean((2, 3)) @ p["linear.weight"].mT + p["linear.bias"]


@pytest.mark.data
def test_resnet20_with_its_published_weights(data_root: Path) -> None:
    path = data_root / "weights" / "resnet20_cifar10.safetensors"
    if not path.exists():
        pytest.skip(f"needs {path}")
    module = fmeta.models.backbone("resnet20", path, ways=10)
    x = pictures(3)
    mean, std = (torch.tensor(v)[:, None, None] for v in (backbones.MEAN, backbones.STD))
    expected = reference_resnet20(fmeta.weights.read(path), (x - mean) / std)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


def tasks(size: int = 8) -> Task:
    """Four pictures of two classes, as many queries, two tasks, in float64."""
    x = [pictures(8, size, seed).double() for seed in (1, 2)]
    y = torch.arange(4).remainder(2).expand(2, 4)
    return Task(Batch(torch.stack([p[:4] for p in x]), y), Batch(torch.stack([p[4:] for p in x]), y))


@pytest.mark.parametrize("adapts", ["linear", None], ids=["anil", "maml"])
@pytest.mark.parametrize("statistics", ["frozen", "batch"])
def test_meta_gradients_through_a_backbone(statistics: Any, adapts: str | None) -> None:
    module = with_statistics(fmeta.models.backbone("resnet20", ways=2)).double()
    apply, params = fmeta.functionalize(module, batch_norm=statistics)
    apply, params = fmeta.freeze(apply, params, ["layer3.2", "linear"])
    algorithm = fmeta.maml(fmeta.losses.cross_entropy(apply), fmeta.sgd(0.1), steps=2, adapts=adapts)
    found, _ = fmeta.meta_grad(algorithm, Plan(compile=False))(params, tasks())
    looped, _ = fmeta.meta_grad(algorithm, Plan(engine="autograd", tasks="loop"))(params, tasks())
    assert_trees_close(found, looped, tolerance=1e-8)
    constant = fmeta.maml(
        fmeta.losses.cross_entropy(apply), fmeta.sgd(0.1), steps=2, adapts=adapts, adjoint=fmeta.first_order()
    )
    assert_trees_differ(found, fmeta.meta_grad(constant, Plan(compile=False))(params, tasks())[0], 1e-7)
