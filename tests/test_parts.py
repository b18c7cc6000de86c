"""Freezing, LoRA, adapters: what is learned of a model, and that it computes what it should."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from helpers import assert_trees_close
from torch import Tensor, nn

import fmeta
from fmeta.types import Batch, Task


def network() -> nn.Module:
    torch.manual_seed(0)
    blocks = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3, track_running_stats=False), nn.Tanh()
    )
    return nn.ModuleDict(
        {"blocks": blocks, "flat": nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), "head": nn.Linear(5, 3)}
    )


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = network()

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts.values():  # type: ignore[operator]
            x = part(x)
        return x


def pictures(seed: int = 0) -> Tensor:
    return torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


INSERTS: list[Callable[[nn.Module], nn.Module]] = [
    lambda module: fmeta.with_lora(module, "*", rank=2, alpha=3.0),
    lambda module: fmeta.with_adapters(module, "*", size=2),
]


@pytest.mark.parametrize("insert", INSERTS)
def test_what_is_put_in_computes_the_same_at_first_and_keeps_names(insert: Any) -> None:
    module = Chain()
    names, before = list(dict(module.named_parameters())), module(pictures())
    small = insert(module)
    torch.testing.assert_close(small(pictures()), before)
    added = [n for n in dict(small.named_parameters()) if n not in names]
    assert added and list(dict(module.named_parameters())) == names
    missing, unexpected = small.load_state_dict(module.state_dict(), strict=False)
    assert not unexpected and set(missing) == set(added)


def test_lora_is_the_low_rank_change_of_the_weights() -> None:
    module = fmeta.with_lora(Chain(), "*", rank=2, alpha=3.0)
    apply, params = fmeta.functionalize(module)
    for i, name in enumerate(n for n in params if "lora_b" in n):
        params[name] = torch.randn(params[name].shape, generator=torch.Generator().manual_seed(i))
    plain, _ = fmeta.functionalize(Chain())
    whole = fmeta.merged(params, alpha=3.0)
    assert_trees_close(apply(params, pictures()), plain(whole, pictures()), tolerance=1e-5)
    layer = "parts.flat.1"
    change = 1.5 * params[f"{layer}.lora_b"] @ params[f"{layer}.lora_a"]
    torch.testing.assert_close(whole[f"{layer}.weight"], params[f"{layer}.weight"] + change)
    with pytest.raises(ValueError, match="merged: params must hold"):
        fmeta.merged({n: p for n, p in params.items() if "lora" in n})


def moved(module: nn.Module) -> nn.Module:
    """The module away from the zeros that it starts with."""
    for i, (name, p) in enumerate(module.named_parameters()):
        if "lora_" in name or "adapter" in name:
            p.data += 0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return module


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, (2, 1), "same"])
def test_padding_of_convolutions_stays(mode: Any, padding: Any) -> None:
    x = torch.randn(2, 2, 7, 7)
    module = nn.Sequential(nn.Conv2d(2, 4, 3, padding=padding, padding_mode=mode))
    small = fmeta.with_lora(module, "*", rank=2)
    torch.testing.assert_close(small(x), module(x))
    params = dict(moved(small).named_parameters())
    module.load_state_dict(fmeta.merged(params))
    torch.testing.assert_close(small(x), module(x), rtol=1e-4, atol=1e-5)


def test_grouped_convolutions_are_passed_over() -> None:
    module = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1))
    small = fmeta.with_lora(module, "*", rank=2)
    assert [name for name, _ in small.named_parameters() if "lora" in name] == ["1.lora_a", "1.lora_b"]


@pytest.mark.parametrize("targets", ["*", "0", "2"])
@pytest.mark.parametrize("insert", ["lora", "adapters"])
def test_a_layer_with_two_names_is_changed_under_both(insert: str, targets: str) -> None:
    layer = nn.Linear(3, 3)
    module = nn.Sequential(layer, nn.Tanh(), layer)
    small: Any = (
        fmeta.with_lora(module, targets) if insert == "lora" else fmeta.with_adapters(module, targets)
    )
    assert small[0] is small[2] and small[0] is not layer and module[0] is layer
    apply, params = fmeta.functionalize(moved(small))
    x = torch.randn(2, 3)
    torch.testing.assert_close(apply(params, x), small(x))


@pytest.mark.parametrize("insert", INSERTS)
@pytest.mark.parametrize("padded", [False, True])
def test_transformers_of_torch_compute_with_what_is_put_in(insert: Any, padded: bool) -> None:
    module = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    small = moved(insert(module))
    x, mask = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([[5], [3], [2]])
    options = {"src_key_padding_mask": mask} if padded else {}
    expected = small(x, **options)
    with torch.no_grad():
        found = small(x, **options)
    torch.testing.assert_close(found, expected.detach())
    assert not torch.allclose(found, module(x, **options))
    assert not any(part.training for part in small.modules())


def test_low_rank_updates_say_what_they_are() -> None:
    small = fmeta.with_lora(Chain(), "*", rank=2, alpha=3.0)
    assert repr(small).count("rank=2, scale=1.5") == 3


def test_frozen_parts_are_constants() -> None:
    apply, params = fmeta.functionalize(Chain())
    part, learned = fmeta.freeze(apply, params, "parts.head")
    assert list(learned) == ["parts.head.weight", "parts.head.bias"]
    torch.testing.assert_close(part(learned, pictures()), apply(params, pictures()))
    changed = {name: p + 1 for name, p in learned.items()}
    torch.testing.assert_close(part(changed, pictures()), apply({**params, **changed}, pictures()))


@pytest.mark.parametrize("insert", [*INSERTS, lambda module: module], ids=["lora", "adapters", "norms"])
def test_meta_gradient_of_the_learned_part_alone(insert: Any) -> None:
    """It is the part of the whole meta-gradient that belongs to it, on both engines."""
    module = insert(Chain()).double()
    apply, params = fmeta.functionalize(module)
    generator = torch.Generator().manual_seed(1)
    params = {
        n: p + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in params.items()
    }
    names = " ".join(params)
    small = "*.lora_*" if "lora" in names else "*.adapter"
    learns = small if "lora" in names or "adapter" in names else fmeta.norm_names(module)
    part, learned = fmeta.freeze(apply, params, learns)
    x = torch.stack([pictures(s).double() for s in range(4)])
    y = torch.arange(6).remainder(3).expand(2, 6)
    tasks = Task(Batch(x[:2], y), Batch(x[2:], y))
    own = fmeta.maml(fmeta.losses.cross_entropy(part), fmeta.sgd(0.1), steps=2)
    whole = fmeta.maml(fmeta.losses.cross_entropy(apply), fmeta.sgd(0.1), steps=2, adapts=list(learned))
    found, _ = fmeta.meta_grad(own, fmeta.Plan(compile=False))(learned, tasks)
    nested, _ = fmeta.meta_grad(own, fmeta.Plan(engine="nested", compile=False))(learned, tasks)
    expected, _ = fmeta.meta_grad(whole, fmeta.Plan(compile=False))(params, tasks)
    assert_trees_close(found, nested, tolerance=1e-10)
    assert_trees_close(found, {name: expected[name] for name in found}, tolerance=1e-9)


def test_last_blocks_and_norms_by_name() -> None:
    names = dict.fromkeys(["conv1.w", "layer1.0.w", "layer1.1.w", "layer2.0.w", "layer3.0.w", "fc.w"])
    assert fmeta.last_blocks(names, 2) == ["layer2.0.w", "layer3.0.w", "fc.w"]
    assert fmeta.norm_names(Chain()) == ["parts.blocks.1.weight", "parts.blocks.1.bias"]
    with pytest.raises(ValueError, match=r"last_blocks: count must be in 1 .. 3, the numbered blocks"):
        fmeta.last_blocks(names, 4)


FIRST_OF_LAST: dict[str, tuple[list[str], int]] = {
    "resnet18": (["layer4.0.conv1.weight", "layer3.0.conv1.weight"], 4),
    "mobilenet_v2": (["features.18.0.weight", "features.17.conv.0.0.weight"], 19),
    "mobilenet_v3_small": (["features.12.0.weight", "features.11.block.0.0.weight"], 13),
    "googlenet": (["inception5b.branch1.conv.weight", "inception5a.branch1.conv.weight"], 9),
    "inception_v3": (["Mixed_7c.branch1x1.conv.weight", "Mixed_7b.branch1x1.conv.weight"], 11),
    "mnasnet0_5": (["layers.14.weight", "layers.13.0.layers.0.weight"], 10),
    "vgg11": (["features.18.weight", "features.16.weight"], 8),
    "efficientnet_b0": (["features.8.0.weight", "features.7.0.block.0.0.weight"], 9),
    "vit_b_16": (["encoder.layers.encoder_layer_11.ln_1.weight", "encoder.layers.encoder_layer_10.ln_1.weight"], 12),
    "swin_t": (["features.7.0.norm1.weight", "features.6.reduction.weight"], 8),
    "convnext_tiny": (["features.7.0.layer_scale", "features.6.0.weight"], 8),
    "densenet121": (["features.denseblock4.denselayer1.norm1.weight"], 4),
}  # fmt: skip


@pytest.mark.parametrize("network", FIRST_OF_LAST)
def test_last_blocks_of_known_networks(network: str) -> None:
    inception = {"init_weights": False} if network in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        names = dict(torchvision.models.get_model(network, **inception).named_parameters())
    firsts, blocks = FIRST_OF_LAST[network]
    assert [fmeta.last_blocks(names, count + 1)[0] for count in range(len(firsts))] == firsts
    with pytest.raises(ValueError, match=rf"count must be in 1 .. {blocks}, the numbered blocks"):
        fmeta.last_blocks(names, 99)


def test_a_letter_behind_a_single_number_is_no_block() -> None:
    names = dict.fromkeys(["conv2d.layers.0.w", "conv2d.layers.1.w", "conv2d.layers.2.w", "head.w"])
    assert fmeta.last_blocks(names, 1) == ["conv2d.layers.2.w", "head.w"]


def test_instance_norms_with_weights_are_norms() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.InstanceNorm2d(4))
    assert fmeta.norm_names(module) == ["1.weight", "1.bias"]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: fmeta.with_lora(m, "*", rank=0), "with_lora: rank must be at least 1, got 0"),
        (lambda m: fmeta.with_lora(m, "parts.blocks.1"), "with_lora: targets must match layers of type Linear or"),
        (lambda m: fmeta.with_lora(m, "*", alpha=-1.0), "with_lora: alpha must be"),
        (lambda m: fmeta.with_lora(m, "hed"), "select: 'hed' matches no parameter"),
        (lambda m: fmeta.with_adapters(m, "*", size=0), "with_adapters: size must be at least 1, got 0"),
        (lambda m: fmeta.with_adapters(m, "parts.blocks"), "with_adapters: targets must match layers of type Linear"),
        (
            lambda m: fmeta.with_lora(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "*"),
            "with_lora: targets must match layers of type Linear or ungrouped Conv2d",
        ),
        (lambda m: fmeta.with_lora(nn.Linear(3, 3), "*"), "with_lora: module must hold layers, got Linear, which is"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(Chain())


def test_layers_that_are_never_called_are_passed_over() -> None:
    """Swin's attention reads the weights of its layers: an update there would do nothing, and learn nothing."""
    from torchvision.models.swin_transformer import SwinTransformer

    module = SwinTransformer([4, 4], 8, [1, 1], [2, 2], [2, 2], num_classes=3).eval()
    names = [name for name, _ in fmeta.with_lora(module, "*", rank=1).named_parameters() if "lora_a" in name]
    assert names and not any(".attn." in name for name in names)
    assert any(".mlp." in name for name in names)
    with pytest.raises(ValueError, match="with_lora: targets must match layers of type Linear or"):
        fmeta.with_lora(module, "*.attn.*")
