"""Weights in and out: files of several kinds, half precision, ordinary state dicts, transformers' own folders."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_trees_equal
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import fmeta
from fmeta import weights


def small(classes: int = 4) -> ResNet:
    """A network of torchvision's class, which is enough to test names."""
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=classes)


class Net(nn.Module):
    """Tied weights, a buffer and statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x))) + self.shift


@pytest.mark.parametrize("kind", ["safetensors", "pt", "checkpoint", "parallel"])
def test_files_of_several_kinds_are_read(tmp_path: Path, kind: str) -> None:
    tensors, path = small().state_dict(), tmp_path / "weights"
    if kind == "safetensors":
        save_file(tensors, path)
    elif kind == "pt":
        torch.save(tensors, path)
    elif kind == "checkpoint":
        torch.save({"epoch": 3, "state_dict": tensors}, path)
    else:
        torch.save({f"module.{name}": x for name, x in tensors.items()}, path)
    assert_trees_equal(dict(sorted(weights.read(path).items())), dict(sorted(tensors.items())))
    assert_trees_equal(dict(weights.load(small(), path).state_dict()), dict(tensors))


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/never",)


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(pickle.dumps({"w": Evil()}))
    with pytest.raises(
        ValueError, match=r"must be safetensors or a plain state dict of torch.save, but reading"
    ):
        weights.read(path)
    torch.save(small(), path)  # a whole module
    with pytest.raises(
        ValueError, match=r"weights.read: .*weights.pt must be safetensors or a plain state dict"
    ):
        weights.read(path)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"weights.read: .*none.pt must be a weights file, but there is none"
    ):
        weights.read(tmp_path / "none.pt")
    save_file({"w": torch.zeros(100)}, tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:200])
    with pytest.raises(ValueError, match=r"weights.read: .*cut.safetensors is cut short or damaged"):
        weights.read(tmp_path / "cut.safetensors")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"weights.read: .*list.pt must hold a state dict, .* got list"):
        weights.read(tmp_path / "list.pt")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"must be a weights file, but it is empty"),
        (b"epoch loss\n1 2\n", r"reading it failed \(it begins with b'epoc', as neither of them does\)"),
        (b"ab", r"it begins with b'ab'"),
        (b"<!DOCTYPE html>", r"it begins with b'<!DO'"),
        ("zip", r"reading it failed \(it is cut short or damaged\). .* copy it again"),
        ("pickle", r"reading it failed \(it is a pickle of something else, cut short or damaged\)"),
        ("module", r"reading it failed \(it is a pickle that calls torch.nn.modules.linear.Linear\)"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_weights_says_what_it_is(tmp_path: Path, content: Any, said: str) -> None:
    path = tmp_path / "weights.pt"
    torch.save(nn.Linear(2, 2) if content == "module" else {"w": torch.zeros(1000)}, path)
    damaged = {
        "zip": path.read_bytes()[:2000],
        "pickle": pickle.dumps({"w": Evil()}),
        "module": path.read_bytes(),
    }
    path.write_bytes(damaged[content] if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=rf"^weights.read: .*weights.pt .*{said}") as error:
        weights.read(path)
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


def test_a_record_is_read_of_safetensors_alone(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(
        ValueError, match=r"weights.record_of: .*x.pt must be a safetensors file, got one of another kind"
    ):
        weights.record_of(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"weights.record_of: .*none must be a safetensors file, got none"):
        weights.record_of(tmp_path / "none")
    save_file({"w": torch.zeros(100)}, tmp_path / "cut")
    assert weights.record_of(tmp_path / "cut") == {}
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"weights.record_of: .*cut is cut short or damaged"):
        weights.record_of(tmp_path / "cut")


def test_what_lies_beside_the_weights_is_left_out_on_loading(tmp_path: Path) -> None:
    own = small().state_dict()
    weights.save(tmp_path / "x", own | {"lr.fc.bias": torch.ones(4)}, record={"beside": ["lr.fc.bias"]})
    assert set(weights.read(tmp_path / "x")) == {*own, "lr.fc.bias"}
    assert set(weights.read(tmp_path / "x", beside=False)) == set(own)
    assert_trees_equal(dict(weights.load(small(), tmp_path / "x").state_dict()), dict(own))


@pytest.mark.parametrize(
    ("kind", "dtype"), [(torch.complex64, "fp16"), (torch.complex64, "bf16"), (torch.complex128, "fp32")]
)
def test_complex_tensors_have_no_half(kind: torch.dtype, dtype: Any) -> None:
    tensors = {"a": torch.ones(1), "filter.weight": torch.ones(1, dtype=kind)}
    with pytest.raises(
        ValueError, match=rf"weights.in_dtype: tensors must be real for {dtype}, but filter.weight is complex"
    ):
        weights.in_dtype(tensors, dtype)


def test_complex_tensors_are_kept_in_single_precision(tmp_path: Path) -> None:
    weights.save(tmp_path / "x", {"w": torch.tensor([1 + 2j])})
    assert torch.equal(weights.read(tmp_path / "x")["w"], torch.tensor([1 + 2j]))


def test_weights_of_another_architecture_say_the_first_differences(tmp_path: Path) -> None:
    bottle = ResNet(BasicBlock, [2, 1, 1, 1], num_classes=7)
    torch.save(bottle.state_dict(), tmp_path / "other.pt")
    said = (
        r"weights.load: the weights of .*other.pt must be those of ResNet, but they are of another architecture. "
        r"unknown: layer1.1.conv1.weight, layer1.1.bn1.weight, layer1.1.bn1.bias and \d+ more; "
        r"another shape: fc.weight is \(7, 512\), not \(4, 512\), fc.bias is \(7,\), not \(4,\)"
    )
    with pytest.raises(ValueError, match=said):
        weights.load(small(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"missing: layer1.1.conv1.weight, layer1.1.bn1.weight"):
        weights.load(bottle, small(7).state_dict())


def test_a_new_head_keeps_its_values() -> None:
    module = small(9)
    loaded = weights.load(module, small(4).state_dict(), new="fc")
    assert torch.equal(loaded.fc.weight, module.fc.weight)
    assert not torch.equal(loaded.conv1.weight, module.conv1.weight)


def test_loading_leaves_the_module_alone() -> None:
    module = small()
    before = module.conv1.weight.clone()
    weights.load(module, small().state_dict())
    assert torch.equal(module.conv1.weight, before)


@pytest.mark.parametrize(("dtype", "kind"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_files_are_half_and_keep_statistics_and_rates(
    tmp_path: Path, dtype: Any, kind: torch.dtype
) -> None:
    tensors = {**small().state_dict(), "lr.fc.weight": torch.tensor(1e-4)}
    weights.save(tmp_path / "full", tensors, record={"a": 1})
    weights.save(tmp_path / "half", tensors, dtype=dtype, record={"a": 1})
    found = weights.read(tmp_path / "half")
    kept = [name for name in tensors if "running" in name or name.startswith("lr.")]
    counters = [name for name in tensors if name.endswith("num_batches_tracked")]
    assert kept and counters
    for name, x in found.items():
        expected = torch.float32 if name in kept else torch.int64 if name in counters else kind
        assert x.dtype == expected, name
        torch.testing.assert_close(x.to(tensors[name].dtype), tensors[name], rtol=1e-2, atol=1e-6)
    assert all(torch.equal(found[name], tensors[name]) for name in kept)
    sizes = [(tmp_path / name).stat().st_size for name in ("half", "full")]
    assert 0.5 <= sizes[0] / sizes[1] < 0.51
    assert weights.record_of(tmp_path / "half") == {"a": 1}
    assert list(tmp_path.glob(".*")) == []


def test_what_float16_has_no_room_for_is_refused_by_name(tmp_path: Path) -> None:
    tensors = {"body.weight": torch.ones(2), "head.weight": torch.tensor([1.0, -7e4])}
    said = (
        r"weights.in_dtype: numbers must be at most 6.55e.04 for fp16, but head.weight has one of size 7e.04"
    )
    with pytest.raises(ValueError, match=said):
        weights.save(tmp_path / "file", tensors, dtype="fp16")
    assert list(tmp_path.iterdir()) == []
    weights.save(tmp_path / "file", tensors, dtype="bf16")
    assert weights.in_dtype({"running_var": torch.tensor(7e4), "x.running_var": torch.tensor(7e4)}, "fp16")
    with pytest.raises(
        ValueError, match=r"weights.in_dtype: dtype must be one of fp32, fp16, bf16, got 'fp8'"
    ):
        weights.in_dtype(tensors, "fp8")  # type: ignore[arg-type]


def test_a_number_that_is_not_finite_stays_so() -> None:
    assert weights.in_dtype({"x": torch.tensor([float("inf")])}, "fp16")["x"].isinf()


def test_a_state_dict_loads_strictly_with_what_was_adapted() -> None:
    module = Net().eval()
    apply, params = fmeta.functionalize(module)
    loss = fmeta.losses.mse(apply)
    batch = fmeta.Batch(torch.rand(4, 3), torch.rand(4, 3))
    adapted = fmeta.adapt(loss, params, batch, fmeta.sgd(0.1), steps=2).params
    assert len(adapted) == 5  # the tied weight once
    plain = Net().eval()
    plain.load_state_dict(weights.state_dict(module, adapted), strict=True)
    torch.testing.assert_close(plain(batch.x), apply(adapted, batch.x))
    assert not torch.allclose(module(batch.x), plain(batch.x))
    part = weights.state_dict(module, {"second.bias": torch.full((3,), 5.0)})
    assert torch.equal(part["second.bias"], torch.full((3,), 5.0))
    assert torch.equal(part["first.weight"], module.first.weight)


def test_low_rank_updates_leave_as_ordinary_weights() -> None:
    module = small().eval()
    apply, params = fmeta.functionalize(fmeta.with_lora(module, ["fc", "layer4.*"], rank=2))
    params = {n: p + 0.01 * torch.randn_like(p) if ".lora_b" in n else p for n, p in params.items()}
    plain = small().eval()
    plain.load_state_dict(weights.state_dict(module, fmeta.merged(params)), strict=True)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(plain(x), apply(params, x), rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"weights.state_dict: params must belong to ResNet, got '.*lora_a' with no"
    ):
        weights.state_dict(module, params)
    with pytest.raises(ValueError, match=r"weights.state_dict: .* got 'fc.bias' with shape \(3,\)"):
        weights.state_dict(module, {"fc.bias": torch.zeros(3)})


def test_a_model_of_transformers_is_saved_as_its_own_folder(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    module = BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=3, **sizes)).eval()
    params = {"classifier.bias": torch.tensor([1.0, 2.0, 3.0])}
    weights.save_pretrained(module, params, tmp_path)
    again = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(again.classifier.bias, params["classifier.bias"])
    assert not torch.equal(module.classifier.bias, params["classifier.bias"])
    tokens = torch.tensor([[1, 5, 7]])
    module.load_state_dict(weights.state_dict(module, params))
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, module(tokens).logits)
    with pytest.raises(
        TypeError, match=r"weights.save_pretrained: a model of transformers was expected, got Net"
    ):
        weights.save_pretrained(Net(), {}, tmp_path)
