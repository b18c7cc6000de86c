"""Freezing, LoRA, adapters: what is learned of a model, and that it computes what it should."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
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


def test_frozen_parts_are_constants() -> None:
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
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(Chain())
        (lambda m: fmeta.with_lora(nn.Linear(3, 3), "*"), "with_lora: module must hold layers, got Linear, which is"),
