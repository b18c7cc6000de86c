"""Learned optimisers: what they are before they learn, what they refuse, and the face of torch.optim."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import assert_trees_close, assert_trees_equal
from tiny_runs import random_pictures
from torch import nn

import fmeta
from fmeta import learned
from fmeta.learned import problems
from fmeta.learned.rule import time_features
from fmeta.parallel import Unsupported

RULES: dict[str, learned.LearnedOptimizer] = {
    "meta_transformer": learned.meta_transformer(lr=0.01),
    "policy": learned.meta_transformer(lr=0.01, knowledge=False),
    "schedule": learned.schedule(lr=0.01),
    "mlp": learned.mlp(hidden=6),
    "lstm": learned.lstm(hidden=5),
}
LIKE_ADAM = ("meta_transformer", "policy", "schedule")
EAGER = fmeta.Plan(compile=False)


def weights(name: str, noise: float = 0.0) -> Any:
    found = {key: leaf.double() for key, leaf in RULES[name].init(0).items()}
    return {key: leaf + noise * torch.randn_like(leaf) for key, leaf in found.items()}


def some_params() -> Any:
    shapes = {"a": (4, 3), "b": (3,), "c": (), "d": (2, 2, 3, 3)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def walk(rule: fmeta.Transform, params: Any, steps: int = 12, scale: float = 1.0) -> Any:
    torch.manual_seed(1)
    state = rule.init(params)
    for k in range(steps):
        grads = {name: scale * (0.1 + k % 3) * torch.randn_like(p) for name, p in params.items()}
        updates, state = rule.update(grads, state, params)
        params = {name: p + updates[name] for name, p in params.items()}
    return params


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("name", LIKE_ADAM)
def test_at_the_start_it_is_adam(name: str, inner: bool) -> None:
    rules = RULES[name](weights(name), steps=20), fmeta.adam(0.01)
    if inner:
        rules = tuple(fmeta.optim.as_inner(rule) for rule in rules)  # type: ignore[assignment]
    params = some_params()
    assert_trees_close(walk(rules[0], params), walk(rules[1], params), 1e-12)


@pytest.mark.parametrize("name", RULES)
def test_the_order_of_parameters_does_not_matter(name: str) -> None:
    theta, params = weights(name, 0.1), some_params()
    rule = RULES[name](theta, steps=30)
    grads = {key: torch.randn_like(p) for key, p in params.items()}
    turned = lambda tree: dict(reversed(tree.items()))  # noqa: E731
    one, _ = rule.update(grads, rule.init(params), params)
    other, _ = rule.update(turned(grads), rule.init(turned(params)), turned(params))
    assert_trees_close(turned(other), one)
    alone, _ = rule.update(turned(grads), rule.init(params), params)
    assert_trees_equal(alone, one)
    with pytest.raises(ValueError):
        rule.update({"z" if key == "a" else key: g for key, g in grads.items()}, rule.init(params), params)


@pytest.mark.parametrize("name", RULES)
def test_an_empty_parameter_does_no_harm(name: str) -> None:
    rule = RULES[name](weights(name, 0.1), steps=9)
    params = {"a": torch.ones(3, dtype=torch.float64), "e": torch.zeros(0, dtype=torch.float64)}
    updates, _ = rule.update(params, rule.init(params), params)
    assert torch.isfinite(updates["a"]).all() and updates["e"].shape == (0,)


@pytest.mark.parametrize("name", LIKE_ADAM)
def test_steps_do_not_depend_on_the_scale_of_the_loss(name: str) -> None:
    rule = RULES[name](weights(name, 0.1), steps=30)
    params = some_params()
    assert_trees_close(walk(rule, params, scale=100.0), walk(rule, params), 1e-3)


@pytest.mark.parametrize("name", LIKE_ADAM)
def test_steps_are_bounded(name: str) -> None:
    rule = RULES[name](weights(name, 30.0), steps=30)
    params = some_params()
    moved = walk(rule, params, steps=1)
    for key, p in params.items():
        assert (moved[key] - p).square().mean().sqrt() <= 0.01 * torch.e**5 * 2.1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", RULES)
def test_a_gradient_that_is_not_finite_is_passed_over(name: str, bad: float) -> None:
    rule, params = RULES[name](weights(name, 0.1)), some_params()
    _, state = rule.update({key: torch.ones_like(p) for key, p in params.items()}, rule.init(params), params)
    grads = {key: torch.full_like(p, bad) for key, p in params.items()}
    one = {key: torch.ones_like(p) for key, p in params.items()}
    one["b"][1] = bad
    for wrong in (grads, one):
        updates, after = rule.update(wrong, state, params)
        assert_trees_equal(updates, {key: torch.zeros_like(p) for key, p in params.items()})
        assert_trees_equal(after, state)


@pytest.mark.parametrize("name", RULES)
def test_zero_gradients_have_finite_derivatives(name: str) -> None:
    params = some_params()

    def moved(theta: Any) -> Any:
        rule = fmeta.optim.as_inner(RULES[name](theta, steps=3))
        grads = {key: 0.0 * p for key, p in params.items()}
        updates, _ = rule.update(grads, rule.init(params), params)
        return sum(u.sum() for u in updates.values())

    for slope in torch.func.grad(moved)(weights(name, 0.1)).values():
        assert torch.isfinite(slope).all()


@pytest.mark.parametrize("name", RULES)
def test_parameters_of_other_types_than_its_weights(name: str) -> None:
    """Half parameters are moved by the update of single ones, and state is never kept in half precision."""
    theta = {key: leaf.float() for key, leaf in weights(name, 0.1).items()}
    rule, params = RULES[name](theta, steps=9), some_params()
    single, half = (
        {key: p.to(dtype) for key, p in params.items()} for dtype in (torch.float32, torch.bfloat16)
    )
    for given in (params, single, half, {**half, "a": single["a"]}):
        state = rule.init(given)
        updates, after = rule.update({key: torch.ones_like(p) for key, p in given.items()}, state, given)
        assert {key: u.dtype for key, u in updates.items()} == {key: p.dtype for key, p in given.items()}
        wide = torch.float64 if given is params else torch.float32
        assert {x.dtype for x in torch.utils._pytree.tree_leaves(after) if x.is_floating_point()} == {wide}
    grads = {key: torch.ones_like(p) for key, p in half.items()}
    found, _ = rule.update(grads, rule.init(half), half)
    again = {key: p.float() for key, p in half.items()}
    want, _ = rule.update({key: g.float() for key, g in grads.items()}, rule.init(again), again)
    assert_trees_equal(found, {key: u.to(torch.bfloat16) for key, u in want.items()})


def small() -> problems.Problem:
    return problems.images(
        random_pictures().train, fmeta.models.mlp([16, 5, 4]), classes=4, size=4, batch=6, varied=True
    )


def as_double(tree: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda x: x.double() if x.is_floating_point() else x, tree)


@pytest.mark.parametrize("plan", [EAGER, pytest.param(fmeta.Plan(compile=True), marks=pytest.mark.compiles)])
@pytest.mark.parametrize("name", RULES)
def test_the_gradient_to_its_weights_equals_finite_differences(name: str, plan: fmeta.Plan) -> None:
    problem, theta = small(), weights(name, 0.1)
    tasks = as_double(problem.sample(0, 0, 2, (3, 4)))
    system = learned.training(problem, RULES[name], steps=4)
    grads, _, metrics = fmeta.estimate(system, fmeta.bptt(), plan)(theta, (), tasks)
    direction = {key: torch.randn_like(leaf) for key, leaf in theta.items()}
    step = 1e-6
    sides = [
        fmeta.estimate(system, fmeta.es(1e-9), EAGER)(
            {key: leaf + sign * step * direction[key] for key, leaf in theta.items()}, (), tasks, 0
        )[2]["loss"]
        for sign in (1, -1)
    ]
    along = sum((grads[key] * direction[key]).sum() for key in theta)
    assert_trees_close(along, (sides[0] - sides[1]) / (2 * step), 2e-5)
    assert metrics["finite"]


@pytest.mark.parametrize("name", ["meta_transformer", "mlp"])
def test_any_algorithm_takes_it_as_its_inner_optimiser(name: str) -> None:
    apply, params = fmeta.functionalize(fmeta.models.mlp([1, 6, 1]).double())
    algorithm = fmeta.maml(fmeta.losses.mse(apply), RULES[name](weights(name, 0.1), steps=2), steps=2)
    tasks = as_double(fmeta.tasks.sinusoid(tasks=3, shots=4, queries=4)(0, 0))
    fast, _ = fmeta.meta_grad(algorithm, EAGER)(params, tasks)
    slow, _ = fmeta.meta_grad(algorithm, fmeta.Plan(engine="nested", compile=False))(params, tasks)
    assert_trees_close(fast, slow)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_gradient_to_initial_weights_equals_finite_differences(steps: int) -> None:
    """To those too: what the rule remembers of the first gradient depends on them."""
    torch.manual_seed(0)
    apply, params = fmeta.functionalize(fmeta.models.mlp([1, 6, 1]).double())
    algorithm = fmeta.learned_update(fmeta.losses.mse(apply), RULES["meta_transformer"], steps=steps)
    drawn = {name: leaf + 0.3 * torch.randn_like(leaf) for name, leaf in params.items()}
    meta = {"params": drawn, "theta": weights("meta_transformer", 0.3)}
    tasks = as_double(fmeta.tasks.sinusoid(tasks=2, shots=4, queries=4)(0, 0))
    grads, _ = fmeta.meta_grad(algorithm, EAGER)(meta, tasks)
    direction = {name: torch.randn_like(leaf) for name, leaf in drawn.items()}

    def at(step: float) -> torch.Tensor:
        moved = {name: leaf + step * direction[name] for name, leaf in drawn.items()}
        each = [fmeta.tree.select(tasks, index) for index in range(2)]
        return sum(algorithm.loss({**meta, "params": moved}, task)[0] for task in each) / 2

    along = sum((grads["params"][name] * direction[name]).sum() for name in direction)
    assert_trees_close(along, (at(1e-6) - at(-1e-6)) / 2e-6, 1e-7)


def test_what_the_rules_refuse() -> None:
    rule = RULES["meta_transformer"]
    with pytest.raises(
        ValueError, match=r"^meta_transformer: theta must have the names .* got nothing for 'film"
    ):
        rule(RULES["schedule"].init(0))
    with pytest.raises(ValueError, match=r"got \[12, 32\] for 'token.weight'"):
        learned.meta_transformer(width=16)(rule.init(0) | {})
    with pytest.raises(ValueError, match=r"^meta_transformer: theta must have .* got list"):
        rule([])  # type: ignore[arg-type]
    rule(rule.init(0), steps=np.int64(3))  # type: ignore[arg-type]
    for steps in (0, float("nan"), float("inf"), "x", True):
        with pytest.raises(
            ValueError, match=rf"^meta_transformer: steps must be a number from 1, got {steps!r}"
        ):
            rule(rule.init(0), steps=steps)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^maml: inner must be a Transform, got Loaded.*loaded\(steps=5\)"):
        fmeta.maml(lambda p, b: p, inner=learned.Loaded(rule, rule.init(0)), steps=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^meta_transformer: width must be a multiple of heads"):
        learned.meta_transformer(width=30)
    with pytest.raises(ValueError, match=r"^meta_transformer: knowledge or policy must be true"):
        learned.meta_transformer(knowledge=False, policy=False)
    with pytest.raises(ValueError, match=r"^images: the pool must have 99 classes"):
        problems.images(random_pictures().train, fmeta.models.mlp([16, 4]), classes=99)


@pytest.mark.parametrize("make", [problems.quadratics, problems.rosenbrock, learned.text])
def test_problems_are_samplers_without_state(make: Any) -> None:
    problem = make()
    tasks = problem.sample(3, 5, 4, (5, 9))
    assert_trees_equal(tasks, problem.sample(3, 5, 4, (5, 9)))
    assert tasks.length.min() >= 5 and tasks.length.max() <= 9
    curve = learned.curves(
        problem, lambda theta, _: fmeta.adam(theta["lr"]), {"lr": torch.tensor(0.03)}, tasks, 30, EAGER
    )
    assert curve.shape == (4, 30)
    assert curve[:, -1].mean() < curve[:, 0].mean()


def test_curves_at_many_rates_are_those_at_each() -> None:
    problem = small()
    tasks = problem.sample(0, 0, 3, 5)
    found = learned.at_rates(problem, "sgd, momentum 0.9", True, tasks, 5, EAGER)
    falls = lambda length: lambda t: 0.05 * (1 + torch.cos(torch.pi * t / length))  # noqa: E731
    rule = lambda theta, length: fmeta.sgd(falls(length), momentum=0.9)  # noqa: E731
    one = learned.curves(problem, rule, {"none": torch.zeros(())}, tasks, 5, EAGER)
    assert found.shape == (13, 3, 5)
    assert_trees_close(found[8], one)  # the ninth rate is 0.01, and those of sgd are ten times that


def test_files(tmp_path: Path) -> None:
    rule = learned.meta_transformer(lr=0.02, hidden=4)
    learned.save(tmp_path / "optimizer.safetensors", rule, rule.init(3))
    for place in (tmp_path, tmp_path / "optimizer.safetensors"):
        loaded = learned.load(place)
        assert loaded.rule.settings == rule.settings
        assert_trees_equal(loaded.theta, rule.init(3))
    params = some_params()
    assert_trees_close(
        walk(loaded(steps=9), as_float(params)), walk(rule(rule.init(3), 9), as_float(params)), 0.0
    )
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    torch.save({"x": torch.zeros(1)}, tmp_path / "pickle.pt")
    for name in ("other.safetensors", "pickle.pt"):
        with pytest.raises(ValueError, match=rf"^learned.load: .*{name} must be a learned optimiser"):
            learned.load(tmp_path / name)


def as_float(params: Any) -> Any:
    return {name: p.float() for name, p in params.items()}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int, begin: int = 0) -> None:
    for k in range(begin, begin + steps):
        torch.manual_seed(k)
        x = torch.randn(10, 6)
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), (x[:, 0] > 0).long()).backward()
        optimizer.step()


def test_the_face_of_torch_equals_the_transform() -> None:
    loaded = learned.Loaded(RULES["meta_transformer"], RULES["meta_transformer"].init(0))
    noisy = loaded._replace(theta={k: v + 0.1 * torch.randn_like(v) for k, v in loaded.theta.items()})
    module = network()
    train(module, noisy.optimizer(module.parameters(), steps=20), 5)
    rule, params = noisy(steps=20), dict(network().named_parameters())
    params = {name: p.detach() for name, p in params.items()}
    state = rule.init(params)
    plain = network()
    for k in range(5):
        torch.manual_seed(k)
        x = torch.randn(10, 6)
        loss = lambda p, x=x: nn.functional.cross_entropy(  # noqa: E731
            torch.func.functional_call(plain, p, x), (x[:, 0] > 0).long()
        )
        updates, state = rule.update(torch.func.grad(loss)(params), state, params)
        params = {name: p + updates[name] for name, p in params.items()}
    assert_trees_close({n: p.detach() for n, p in module.named_parameters()}, params)


LARGE = [(3, 7000), (1024,), (5,), (), (0, 4)]


def large(knowledge: bool = True, dtype: torch.dtype = torch.float32) -> tuple[nn.ParameterList, Any, Any]:
    """Parameters that go by blocks (of several, of part of one, of none), and an optimiser with its transform."""
    torch.set_num_threads(1)
    rule = learned.meta_transformer(lr=0.01, width=8, knowledge=knowledge)
    theta = {k: (v + 0.2 * torch.randn_like(v)).to(dtype) for k, v in rule.init(0).items()}
    module = nn.ParameterList([torch.randn(shape) for shape in LARGE])
    return module, learned.Optimizer(module, rule, theta, steps=6), rule(theta, 6)


def give_gradients(module: nn.ParameterList, scale: float = 1.0) -> dict[str, torch.Tensor]:
    for p in module:
        p.grad = scale * torch.randn_like(p)
    return {f"p{i}": p.grad.clone() for i, p in enumerate(module)}


def values(module: nn.ParameterList) -> dict[str, torch.Tensor]:
    return {f"p{i}": p.detach().clone() for i, p in enumerate(module)}


@pytest.mark.compiles
@pytest.mark.parametrize(("knowledge", "dtype"), [(True, torch.float32), (False, torch.float64)])
def test_the_face_takes_large_models_by_blocks(knowledge: bool, dtype: torch.dtype) -> None:
    """A step without finite gradients changes nothing; the state goes to another optimiser."""
    module, optimizer, transform = large(knowledge, dtype)
    params = values(module)
    state = transform.init(params)
    for k in range(4):
        grads = give_gradients(module, 10.0 ** (k - 2))
        if k == 2:
            module[2].grad[3] = grads["p2"][3] = float("nan")
        optimizer.step()
        updates, state = transform.update(grads, state, params)
        assert all(updates["p0"].flatten() != 0) == (k != 2)
        params = {name: p + updates[name] for name, p in params.items()}
        assert_trees_close(values(module), params, 1e-6)
    assert optimizer.blocks is not None and optimizer.skipped == 1
    kept = optimizer.state_dict()["learned"]["state"]
    assert_trees_close(kept, dict(fmeta.tree.paths(state)), 1e-5)
    again = learned.Optimizer(module, optimizer.rule, optimizer.theta, steps=6)
    again.load_state_dict(optimizer.state_dict())
    before = values(module)
    optimizer.step()
    after = values(module)
    for p, old in zip(module, before.values(), strict=True):
        p.data.copy_(old)
    again.step()
    assert_trees_equal(values(module), after)


@pytest.mark.compiles
@pytest.mark.parametrize("small", [False, True])
def test_a_gradient_whose_square_is_not_finite_is_passed_over(small: bool) -> None:
    module, optimizer, transform = large()
    if small:
        module = nn.ParameterList([torch.randn(2, 3), torch.randn(4)])
        optimizer = learned.Optimizer(module, optimizer.rule, optimizer.theta, steps=6)
    give_gradients(module)
    optimizer.step()
    before = values(module)
    give_gradients(module, 1e19)
    optimizer.step()
    assert_trees_equal(values(module), before)
    assert optimizer.skipped == 1
    give_gradients(module)
    optimizer.step()
    assert all(p.isfinite().all() for p in module)
    grads = give_gradients(module, 1e19)
    updates, _ = (
        transform.update(grads, transform.init(before), before) if not small else ({"p0": torch.zeros(1)}, 0)
    )
    assert not updates["p0"].any()
    half = {"w": torch.full((3,), 300.0, dtype=torch.float16)}
    assert transform.update(half, transform.init(half), half)[0]["w"].any(), (
        "its square is taken in single precision"
    )


@pytest.mark.compiles
def test_an_interrupted_step_leaves_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    (module, optimizer, _), (other, undisturbed, _) = large(), large()
    for p, q in zip(module, other, strict=True):
        q.data.copy_(p.data)
    undisturbed.theta = optimizer.theta
    for k in range(4):
        for grad, q in zip(give_gradients(module).values(), other, strict=True):
            q.grad = grad
        if k == 2:

            def interrupted(*args: Any, **options: Any) -> Any:
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setitem(optimizer.blocks.made, "second", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    optimizer.step()
            grads = [p.grad for p in module]
            for p in module:
                p.grad = torch.full_like(p, float("nan"))
            optimizer.step()
            for p, grad in zip(module, grads, strict=True):
                p.grad = grad
        optimizer.step()
        undisturbed.step()
    assert_trees_equal(values(module), values(other))
    assert optimizer.skipped == 1


@pytest.mark.compiles
def test_blocks_take_parameters_as_they_lie_in_memory() -> None:
    """In a wider tensor, turned, or with turned gradients; autograd is told that they changed."""
    module, optimizer, transform = large()
    wider = torch.randn(2, 3, 7000)
    module[0], module[1] = nn.Parameter(wider[1]), nn.Parameter(torch.randn(7000, 3).T)
    optimizer = learned.Optimizer(module, optimizer.rule, optimizer.theta, steps=6)
    others, params = wider[0].clone(), values(module)
    state = transform.init(params)
    for _ in range(2):
        grads = give_gradients(module)
        module[0].grad = module[0].grad.T.contiguous().T
        product = (module[0] * module[0]).sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
        updates, state = transform.update(grads, state, params)
        params = {name: p + updates[name] for name, p in params.items()}
        assert_trees_close(values(module), params, 1e-6)
    assert_trees_equal([wider[0]], [others])
    assert optimizer.blocks is not None and module[1].stride() == (1, 3)


@pytest.mark.compiles
def test_without_a_kernel_for_blocks_the_update_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    (module, optimizer, transform), params = (made := large()), values(made[0])

    def fails(*args: Any, **options: Any) -> Any:
        raise Unsupported("the C++ compiler failed")

    monkeypatch.setattr("fmeta.learned.blocks.by_rows", fails)
    state = transform.init(params)
    for _ in range(2):
        updates, state = transform.update(give_gradients(module), state, params)
        optimizer.step()
        params = {name: p + updates[name] for name, p in params.items()}
        assert_trees_close(values(module), params, 1e-6)
    assert optimizer.blocks is None


@pytest.mark.compiles
def test_blocks_come_and_go_with_the_parameters() -> None:
    module, optimizer, _ = large()
    give_gradients(module)
    optimizer.step()
    first = optimizer.blocks
    module[1].grad = None
    optimizer.step()
    second = optimizer.blocks
    give_gradients(module)
    optimizer.step()
    assert second is not None and second is not first and optimizer.blocks is first, "made once for each set"
    assert not second.lines and first.lines, "memory for the set in use alone"
    module.double()
    give_gradients(module)
    optimizer.param_groups[0]["lr"] = 0.0
    before = values(module)
    optimizer.step()
    assert optimizer.blocks is None
    assert_trees_equal(values(module), before)
    small = nn.ParameterList([torch.randn(8, 8) for _ in range(10)])
    face = learned.Optimizer(small, optimizer.rule, optimizer.theta)
    give_gradients(small)
    face.step()
    assert face.blocks is None, "small tensors would be mostly padding"
    assert pickle.loads(pickle.dumps(optimizer.rule)).name == "meta_transformer"


def test_the_face_refuses_sparse_gradients_and_copies_its_rate() -> None:
    module = nn.Embedding(5, 3, sparse=True)
    face = learned.Optimizer(module.parameters(), RULES["schedule"], RULES["schedule"].init(0), lr=0.5)
    module(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"^learned.Optimizer: gradients must be dense, got a sparse one"):
        face.step()
    again = copy.deepcopy(face)
    again.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert [group["lr"] for group in again.param_groups] == [0.5, 0.5]


@pytest.mark.parametrize("name", ["schedule", "lstm"])
def test_the_face_goes_on_from_a_state_dict(name: str) -> None:
    loaded = learned.Loaded(RULES[name], RULES[name].init(0))
    whole, parts = network(), network()
    train(whole, loaded.optimizer(whole.parameters(), steps=8), 6)
    first = loaded.optimizer(parts.parameters(), steps=8)
    train(parts, first, 3)
    second = loaded.optimizer(parts.parameters(), steps=8)
    second.load_state_dict(first.state_dict())
    train(parts, second, 3, begin=3)
    assert_trees_equal(dict(whole.state_dict()), dict(parts.state_dict()))
    other = "lstm" if name == "schedule" else "schedule"
    strange = learned.Loaded(RULES[other], RULES[other].init(0)).optimizer(parts.parameters())
    for state in (torch.optim.Adam(parts.parameters()).state_dict(), strange.state_dict()):
        with pytest.raises(ValueError, match=rf"^learned.Optimizer: the state dict must be one of {name}"):
            second.load_state_dict(state)
    wider = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2))
    face = loaded.optimizer(wider.parameters(), steps=8)
    with pytest.raises(
        ValueError, match=r"^learned.Optimizer: the state dict must be of parameters of the same"
    ):
        face.load_state_dict(second.state_dict())
    copied, copied_optimizer = copy.deepcopy((parts, second))
    train(parts, second, 2, begin=6)
    train(copied, copied_optimizer, 2, begin=6)
    assert_trees_equal(dict(copied.state_dict()), dict(parts.state_dict()))
    with pytest.raises(TypeError, match=r"^learned.Optimizer: it cannot be pickled"):
        pickle.dumps(second)


def test_the_face_with_groups_frozen_parameters_and_bad_gradients() -> None:
    loaded = learned.Loaded(RULES["meta_transformer"], RULES["meta_transformer"].init(0))
    module = network()
    optimizer = loaded.optimizer(
        [{"params": module[0].parameters(), "lr": 0.0}, {"params": module[2].parameters()}]
    )
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    train(module, optimizer, 2)
    assert torch.equal(module[0].weight, before["0.weight"])
    assert not torch.equal(module[2].weight, before["2.weight"])
    module[2].weight.requires_grad_(False)
    module[2].weight.grad = None
    kept = module[2].weight.detach().clone()
    seen = optimizer.state_dict()["learned"]["state"]
    train(module, optimizer, 2, begin=2)
    assert torch.equal(module[2].weight, kept)
    module[2].weight.requires_grad_(True)
    extra = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [extra]})
    extra.grad = torch.ones(2)
    states = [optimizer.state_dict()["learned"]["state"] for _ in range(2)]
    frozen = [key for key in states[0] if key.endswith("p2")]  # 2.weight, of which there are four moments
    assert len(frozen) == 4
    train(module, optimizer, 1, begin=4)
    after = optimizer.state_dict()["learned"]["state"]
    for key in frozen:
        assert_trees_equal(states[0][key], seen[key])  # kept while there was no gradient
        assert not torch.equal(after[key], seen[key])
    assert not torch.equal(module[2].weight, kept)
    extra.grad = torch.full((2,), torch.nan)
    now = [p.detach().clone() for p in module.parameters()]
    optimizer.step()
    assert optimizer.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(now, module.parameters(), strict=True))
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0
    optimizer.zero_grad()
    assert optimizer.step() is None
    with pytest.raises(ValueError, match=r"^learned.Optimizer: lr must be in \[0, inf\), got -1"):
        loaded.optimizer(module.parameters(), lr=-1.0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: learned.mlp(hidden=0), "mlp: hidden must be a positive int, got 0"),
        (lambda: learned.mlp(lr=-1.0), "mlp: lr must be in"),
        (lambda: learned.lstm(layers=1.5), "lstm: layers must be a positive int, got 1.5"),  # type: ignore[arg-type]
        (lambda: learned.lstm(scale=0.0), "lstm: scale must be above 0"),
        (lambda: learned.schedule(lr=0.0), "schedule: lr must be above 0"),
        (lambda: learned.schedule(longest=0), "schedule: longest must be a positive int, got 0"),
        (lambda: learned.schedule(width=30), "schedule: width must be a multiple of heads, got 30 and 4"),
        (lambda: learned.meta_transformer(heads=0), "meta_transformer: heads must be a positive int, got 0"),
        (lambda: learned.text(width=15), "learned.text: width must be even, for two heads, got 15"),
        (lambda: learned.text(batch=0), "learned.text: batch must be a positive int, got 0"),
    ],
)
def test_odd_settings_are_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=rf"^{said}"):
        make()


def test_rates_of_the_face_are_checked_in_every_group() -> None:
    loaded = learned.Loaded(RULES["schedule"], RULES["schedule"].init(0))
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"^learned.Optimizer: lr must be in \[0, inf\), got nan"):
        loaded.optimizer([p], lr=float("nan"))
    for lr, kind in (("a", "str"), (None, "NoneType")):
        with pytest.raises(TypeError, match=rf"^learned.Optimizer: lr must be a number, got {kind}"):
            loaded.optimizer([p], lr=lr)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^learned.Optimizer: parameters must be real, got complex ones"):
        loaded.optimizer([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match=r"^learned.Optimizer: lr must be in \[0, inf\), got -0.5"):
        loaded.optimizer([{"params": [p]}, {"params": [q], "lr": -0.5}])
    optimizer = loaded.optimizer([p], lr=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"^learned.Optimizer: lr must be in \[0, inf\), got -1"):
        optimizer.add_param_group({"params": [q], "lr": -1.0})


WHOLE = {"rule": "schedule", "settings": dict(RULES["schedule"].settings), "state": {}, "skipped": 0}


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        {},
        {"rule": "schedule"},
        3,
        *({**WHOLE, n: w} for n, w in (("state", [1]), ("state", {"t": 1}), ("skipped", None))),
    ],
)
def test_a_damaged_state_dict_is_refused(damaged: Any) -> None:
    optimizer = learned.Loaded(RULES["schedule"], RULES["schedule"].init(0)).optimizer(
        [nn.Parameter(torch.ones(2))]
    )
    saved = optimizer.state_dict() | {"learned": damaged}
    with pytest.raises(ValueError, match=r"^learned.Optimizer: the state dict must be one of schedule"):
        optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"^learned.Optimizer: the state dict must be one of schedule"):
        optimizer.load_state_dict([])  # type: ignore[arg-type]
    optimizer.load_state_dict(optimizer.state_dict() | {"learned": WHOLE})
    with pytest.raises(TypeError, match=r"param_group must be a dict"):
        optimizer.add_param_group([1])  # type: ignore[arg-type]


def test_a_state_goes_on_under_another_clock() -> None:
    rule, p, q = RULES["schedule"], nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    before = learned.Loaded(rule, rule.init(0)).optimizer([p])
    p.grad = torch.tensor([1.0, -2.0])
    before.step()
    slower = learned.Loaded(learned.schedule(**rule.settings, longest=5), rule.init(0)).optimizer([q])
    slower.load_state_dict(before.state_dict())
    assert_trees_equal(slower.state_dict()["learned"]["state"], before.state_dict()["learned"]["state"])
    assert slower.state_dict()["learned"]["state"]["t"] == 1


def test_a_clock_goes_slower_on_longer_trainings_than_it_learned_on() -> None:
    """At three times the steps it reads a third of the time; without a length it stops at the longest."""
    t = torch.arange(1, 601, dtype=torch.float64)
    read = torch.vmap(time_features, in_dims=(0, None, None))
    short, long = read(t[:200], 200, 200), read(t, 600, 200)
    assert_trees_equal(read(t[:200], 200, None), short)
    assert_trees_close(long[2::3], short, 1e-12)
    assert_trees_close(read(t[:50], torch.tensor(50), 200), read(t[:50], 50, None), 0.0)
    assert_trees_equal(read(t, None, 200)[199:, :-3], short[-1:, :-3].expand(401, -1))
    assert not torch.equal(read(t, None, None)[-1], read(t, None, 200)[-1])


@pytest.mark.compiles
@pytest.mark.parametrize("name", ["meta_transformer", "schedule"])
def test_the_longest_training_is_a_setting(tmp_path: Path, name: str) -> None:
    make = getattr(learned, name)
    rules = make(lr=0.01), make(lr=0.01, longest=20)
    theta = {k: v + 0.3 * torch.randn_like(v) for k, v in rules[0].init(0).items()}
    params = as_float(some_params())
    assert "longest" not in rules[0].settings, "files of earlier versions have none"
    assert_trees_equal(*[walk(rule(theta, 20), params) for rule in rules])
    far = [walk(rule(theta, 60), params, 30) for rule in rules]
    assert (far[0]["a"] - far[1]["a"]).abs().max() > 1e-4
    learned.save(tmp_path / "optimizer.safetensors", rules[1], theta)
    loaded = learned.load(tmp_path)
    assert loaded.rule.settings["longest"] == 20
    assert_trees_equal(walk(loaded(60), params, 30), far[1])


@pytest.mark.compiles
def test_many_small_tensors_go_by_blocks() -> None:
    """A kernel that names each of them would take a minute to build."""
    torch.set_num_threads(1)
    module = nn.ParameterList([torch.randn(2, 1 + i % 5) for i in range(20)])
    rule = learned.meta_transformer(lr=0.01, width=8, longest=10)
    theta = {k: v + 0.2 * torch.randn_like(v) for k, v in rule.init(0).items()}
    optimizer, transform = learned.Optimizer(module, rule, theta, steps=30), rule(theta, 30)
    params, state = values(module), transform.init(values(module))
    for k in range(3):
        updates, state = transform.update(give_gradients(module, 10.0**k), state, params)
        optimizer.step()
        params = {name: p + updates[name] for name, p in params.items()}
        assert_trees_close(values(module), params, 1e-6)
    assert optimizer.blocks is not None


@pytest.mark.parametrize("name", LIKE_ADAM)
def test_large_gradients_are_read_as_small_ones(name: str) -> None:
    """The square of their mean square is no number in single precision; what is read of it is a cosine."""
    theta = {k: v.float() for k, v in weights(name, 0.1).items()}
    params = as_float(some_params())
    usual, large = (walk(RULES[name](theta, 20), params, 3, scale) for scale in (1e6, 1e13))
    assert_trees_close(usual, large, 1e-3)


def test_a_rule_of_ones_own_is_not_saved(tmp_path: Path) -> None:
    rule = RULES["schedule"]._replace(name="mine")
    with pytest.raises(
        ValueError, match=r"^learned.save: rule must be one that load can make again \(.*got 'mine'"
    ):
        learned.save(tmp_path / "mine.safetensors", rule, rule.init(0))
    assert not list(tmp_path.iterdir())
