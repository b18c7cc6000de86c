"""Dropout in the loss: refused, or with masks that every engine and every evaluation of a step share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_trees_close, assert_trees_differ, assert_trees_equal
from problems import TASKS, classification_tasks, episodes, network, regression_tasks
from reference import networks, rules
from reference.loops import Pair, maml, meta_gradient
from torch import Tensor, nn

import fmeta
from fmeta import Batch, Plan

STEPS, HIDDEN = 3, 4
ORDERS = {"exact": fmeta.unroll(), "truncated": fmeta.truncated(1), "first order": fmeta.first_order()}
every_order = pytest.mark.parametrize("adjoint", ORDERS.values(), ids=ORDERS)
every_kind = pytest.mark.parametrize("randomness", ["same", "different"])


class Dropout:
    """A loss with dropout on the hidden layer that remembers the masks it has drawn."""

    def __init__(self) -> None:
        self.masks: list[Tensor] = []

    def __call__(self, params: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        mask = F.dropout(torch.ones(HIDDEN, dtype=torch.float64), 0.5)
        self.masks.append(torch.func.debug_unwrap(mask).clone())
        return ((networks.mlp(params, batch.x, [mask]) - batch.y) ** 2).mean(), {}


def gradient(loss: Any, adjoint: fmeta.Adjoint = ORDERS["exact"], seed: int = 1, **plan: Any) -> Any:
    """The second call of a meta-gradient, after torch's generator was given a seed."""
    inner = fmeta.sgd(0.2, momentum=0.5)
    function = fmeta.meta_grad(fmeta.maml(loss, inner, steps=STEPS, adjoint=adjoint), Plan(**plan))
    function(network(), regression_tasks())
    loss.masks.clear()
    torch.manual_seed(seed)
    return function(network(), regression_tasks())[0]


def masked_error(params: dict[str, Tensor], pair: Pair) -> Tensor:
    (x, mask), y = pair
    return ((networks.mlp(params, x, [mask]) - y) ** 2).mean()


def with_given_masks(masks: list[Tensor], last: int | None) -> Any:
    """The plain loop; ``masks`` holds one for every inner step and one for the query loss, ``[task, hidden]``."""
    tasks = []
    for index, ((x, y), (query_x, query_y)) in enumerate(episodes(regression_tasks())):
        *inner, query = (mask[index] for mask in masks)
        repeated = torch.stack([x] * STEPS), torch.stack([y] * STEPS)
        tasks.append((((repeated[0], torch.stack(inner)), repeated[1]), ((query_x, query), query_y)))
    objective = maml(masked_error, rules.sgd(0.2, 0.5), STEPS, last=last, per_step=True)
    return meta_gradient(objective, network(), tasks)[0]


@every_order
@every_kind
def test_engines_agree_with_a_loop_that_is_given_the_masks(randomness: str, adjoint: fmeta.Adjoint) -> None:
    loss = Dropout()
    nested = gradient(loss, adjoint, engine="nested", randomness=randomness)
    masks = [mask.expand(TASKS, HIDDEN) for mask in loss.masks]
    assert len(masks) == STEPS + 1
    assert len({tuple(mask.flatten().tolist()) for mask in masks[:STEPS]}) > 1, (
        "every step drew the same mask"
    )
    if randomness == "different":
        assert any(not torch.equal(mask[0], mask[1]) for mask in masks), "every task drew the same mask"
    assert_trees_close(nested, with_given_masks(masks, adjoint.last), 1e-10)
    assert_trees_close(gradient(loss, adjoint, randomness=randomness), nested, 1e-10)


@every_kind
def test_recomputed_steps_meet_the_same_masks(randomness: str) -> None:
    loss = Dropout()
    want = gradient(loss, randomness=randomness)
    for remat in (1, 2):
        assert_trees_close(gradient(loss, randomness=randomness, remat=remat), want, 1e-12)


@pytest.mark.parametrize("engine", ["adjoint", "nested", "autograd"])
def test_the_same_mask_in_every_task_however_they_are_taken(engine: str) -> None:
    loss = Dropout()
    want = gradient(loss, randomness="same")
    assert_trees_close(gradient(loss, randomness="same", tasks="loop", engine=engine), want, 1e-10)
    if engine != "autograd":
        assert_trees_close(gradient(loss, randomness="same", chunk_size=2, engine=engine), want, 1e-10)


@pytest.mark.parametrize("engine", ["adjoint", "nested", "autograd"])
def test_loops_and_chunks_draw_a_mask_a_task(engine: str) -> None:
    loss = Dropout()
    gradient(loss, randomness="different", tasks="loop", engine=engine)
    assert len({tuple(mask.flatten().tolist()) for mask in loss.masks}) > STEPS + 1


@every_kind
def test_masks_follow_the_seed(randomness: str) -> None:
    loss = Dropout()
    want = gradient(loss, seed=1, randomness=randomness)
    assert_trees_equal(gradient(loss, seed=1, randomness=randomness), want)
    assert_trees_differ(gradient(loss, seed=2, randomness=randomness), want)


def test_every_call_draws_new_masks_and_leaves_the_generator_usable() -> None:
    loss = Dropout()
    function = fmeta.meta_grad(fmeta.maml(loss, fmeta.sgd(0.2), steps=2), Plan(randomness="different"))
    torch.manual_seed(3)
    results = [function(network(), regression_tasks())[0] for _ in range(3)]
    noise = torch.randn(4)
    torch.manual_seed(3)
    again = [function(network(), regression_tasks())[0] for _ in range(3)]
    assert_trees_equal(again, results)
    assert torch.equal(torch.randn(4), noise)
    assert_trees_differ(results[0], results[1])
    assert_trees_differ(results[1], results[2])


@pytest.mark.parametrize("engine", ["adjoint", "nested", "autograd"])
def test_random_losses_are_refused_by_name(engine: str) -> None:
    tasks = "loop" if engine == "autograd" else "vmap"
    algorithm = fmeta.maml(Dropout(), fmeta.sgd(0.2), steps=1)
    message = r"the loss calls the random operation \w*(bernoulli|dropout)\w*, got Plan\(randomness='error'\)"
    with pytest.raises(ValueError, match=message):
        fmeta.meta_grad(algorithm, Plan(engine=engine, tasks=tasks))(network(), regression_tasks())
    with pytest.raises(ValueError, match=message):
        fmeta.meta_eval(algorithm, Plan(engine=engine, tasks=tasks))(network(), regression_tasks())


def test_a_random_loss_is_not_compiled() -> None:
    algorithm = fmeta.maml(Dropout(), fmeta.sgd(0.2), steps=1)
    with pytest.raises(ValueError, match=r"Plan\(compile=True\): .* because the loss is random"):
        plan = Plan(compile=True, randomness="same")
        fmeta.meta_grad(algorithm, plan)(network(), regression_tasks())


@every_kind
def test_dropout_layers_of_a_module(randomness: str) -> None:
    module = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    tasks = classification_tasks(2)

    def gradient_of(engine: str) -> Any:
        apply, params = fmeta.functionalize(module)
        algorithm = fmeta.maml(fmeta.losses.cross_entropy(apply), fmeta.sgd(0.2), steps=2)
        torch.manual_seed(5)
        return fmeta.meta_grad(algorithm, Plan(engine=engine, randomness=randomness))(params, tasks)[0]

    assert_trees_close(gradient_of("adjoint"), gradient_of("nested"), 1e-10)


def test_dropout_is_off_in_eval_mode() -> None:
    module = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 3)).double().eval()
    apply, params = fmeta.functionalize(module)
    algorithm = fmeta.maml(fmeta.losses.cross_entropy(apply), fmeta.sgd(0.2), steps=1)
    grads, metrics = fmeta.meta_grad(algorithm, Plan(compile=False))(params, classification_tasks(2))
    assert bool(metrics["finite"])
    assert_trees_equal(
        fmeta.meta_grad(algorithm, Plan(compile=False))(params, classification_tasks(2))[0], grads
    )
