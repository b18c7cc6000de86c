"""Calibration: the binned sums and their error against loops written out, edges, shapes, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_trees_close, assert_trees_equal
from torch import Tensor
from torch.func import vmap

from fmeta import tree
from fmeta.losses import calibration_error, cross_entropy, reliability
from fmeta.types import Batch


def problem(*lead: int, ways: int = 4, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    logits = spread * torch.randn(*lead, ways, dtype=torch.float64)
    return logits, torch.randint(ways, lead)


def plain_error(logits: list[list[float]], labels: list[int], bins: int) -> float:
    """Guo et al., 2017, eq. 3, one example after another."""
    members: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(logits, labels, strict=True):
        weights = [math.exp(x - max(row)) for x in row]
        confidence = max(weights) / sum(weights)
        place = next(m for m in range(1, bins + 1) if confidence <= m / bins)
        members.setdefault(place, []).append((confidence, row.index(max(row)) == label))
    error = 0.0
    for found in members.values():
        accuracy = sum(right for _, right in found) / len(found)
        confidence = sum(c for c, _ in found) / len(found)
        error += len(found) / len(labels) * abs(accuracy - confidence)
    return error


@pytest.mark.parametrize("bins", [1, 2, 15, 100])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_the_error_is_that_of_a_loop_over_examples(bins: int, spread: float) -> None:
    logits, labels = problem(200, spread=spread)
    want = plain_error(logits.tolist(), labels.tolist(), bins)
    assert want > 0.05
    assert calibration_error(logits, labels, bins).item() == pytest.approx(want, rel=1e-12)


def test_fifteen_bins_unless_said_otherwise() -> None:
    logits, labels = problem(50)
    assert reliability(logits, labels).examples.shape == (15,)
    assert calibration_error(logits, labels) == calibration_error(logits, labels, bins=15)


def test_leading_dimensions_are_kept_apart() -> None:
    logits, labels = problem(3, 2, 40)
    found = calibration_error(logits, labels)
    assert found.shape == (3, 2)
    for i in range(3):
        for j in range(2):
            assert_trees_close(found[i, j], calibration_error(logits[i, j], labels[i, j]), 1e-12)
    assert_trees_close(vmap(calibration_error)(logits, labels), found, 1e-12)


def test_sums_of_parts_add_up_to_those_of_the_whole() -> None:
    logits, labels = problem(90)
    parts = [reliability(logits[i::3], labels[i::3]) for i in range(3)]
    total = tree.add(tree.add(parts[0], parts[1]), parts[2])
    assert_trees_close(total, reliability(logits, labels), 1e-12)
    assert_trees_close(total.error, calibration_error(logits, labels), 1e-12)
    mean = sum(part.error.item() for part in parts) / 3
    assert abs(mean - total.error.item()) > 1e-3, "the mean of errors is another number"


def test_a_bin_holds_its_upper_edge() -> None:
    half, sure = torch.zeros(1, 2), torch.tensor([[0.0, 200.0]])
    assert reliability(half, torch.tensor([0]), bins=2).examples.tolist() == [1, 0]
    assert reliability(half, torch.tensor([0]), bins=3).examples.tolist() == [0, 1, 0]
    found = reliability(sure, torch.tensor([1]), bins=4)
    assert [x.tolist() for x in found] == [[0, 0, 0, 1]] * 3


def test_a_model_that_is_right_as_often_as_it_says_has_no_error() -> None:
    logits = torch.tensor([0.75, 0.25], dtype=torch.float64).log().expand(4, 2)
    assert calibration_error(logits, torch.tensor([0, 0, 0, 1])).item() == pytest.approx(0.0, abs=1e-12)
    assert calibration_error(logits, torch.tensor([1, 1, 1, 1])).item() == pytest.approx(0.75)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_binned_in_float32(dtype: torch.dtype) -> None:
    logits, labels = problem(30)
    found = reliability(logits.to(dtype), labels)
    assert_trees_equal(found, reliability(logits.to(dtype).float(), labels))


def test_there_is_no_derivative_and_no_error_without_examples() -> None:
    logits, labels = problem(5)
    assert not calibration_error(logits.requires_grad_(), labels).requires_grad
    assert calibration_error(logits[:0], labels[:0]).isnan()


def test_accuracy_is_that_of_the_loss() -> None:
    logits, labels = problem(40)
    found = reliability(logits, labels)
    _, metrics = cross_entropy(lambda params, x: x)({}, Batch(logits, labels))
    assert (found.correct.sum() / found.examples.sum()).item() == pytest.approx(metrics["accuracy"].item())


@pytest.mark.parametrize("bins", [0, -1, 1.5, True])
def test_bins_are_counted(bins: int) -> None:
    with pytest.raises(ValueError, match=f"reliability: bins must be an int of at least 1, got {bins!r}"):
        calibration_error(*problem(3), bins=bins)


@pytest.mark.parametrize(("logits", "labels"), [((3, 4), (2,)), ((3,), (3,)), ((2, 3, 4), (3,))])
def test_every_row_has_one_label(logits: tuple[int, ...], labels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"logits must be \[..., n, ways\] and labels \[..., n\], got \("):
        calibration_error(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64))
