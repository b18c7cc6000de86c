"""Optimisers under vmap, grad, torch.compile and make_fx; derivatives of unrolled inner loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_trees_close, assert_trees_equal
from optim_cases import OPTIMISERS, Make, each_optimiser, example_grads, example_params, follow
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from fmeta import optim, schedules, tree

Params = dict[str, Tensor]
Loss = Callable[[Params], Tensor]


@each_optimiser
def test_stacked_parameters_are_a_loop_over_them(make: Make) -> None:
    rates, many = torch.tensor([0.01, 0.1, 0.5]).double(), [example_params(seed=seed) for seed in range(3)]
    grads = [list(example_grads(p, 3, seed=seed)) for seed, p in enumerate(many)]

    def run(lr: Tensor, params: Params, grads: list[Params]) -> Any:
        return follow(make(lr), params, iter(grads))

    want = tree.stack([run(lr, p, g) for lr, p, g in zip(rates, many, grads, strict=True)])
    got = vmap(run)(rates, tree.stack(many), tree.stack(grads))
    assert_trees_close(got, want, tolerance=1e-13)


def quartic(params: Params) -> Tensor:
    """Smooth, coupled, and steep enough that second derivatives matter."""
    total = torch.cat([p.reshape(-1) for p in params.values()])
    return (
        (total**2).sum() + 0.1 * (total * total.roll(1)).sum() + 0.05 * (total**4).sum() + total.sin().sum()
    )


def unrolled(rule: Any, loss: Loss, params: Params, steps: int = 3) -> Params:
    """Parameters after ``steps`` inner updates."""
    state = rule.init(params)
    for _ in range(steps):
        updates, state = rule.update(grad(loss)(params), state, params)
        params = tree.add(params, updates)
    return params


def objective(make: Make, loss: Loss, inner: bool = True) -> Callable[[Params, Tensor], Tensor]:
    """A query loss after three inner updates, of initial parameters and rate."""

    def after(params: Params, lr: Tensor) -> Tensor:
        rule = optim.as_inner(make(lr)) if inner else make(lr)
        adapted = unrolled(rule, loss, params)
        return sum(((p - 0.3 * k) ** 3 + p).sum() for k, p in enumerate(adapted.values(), 1))

    return after


def central_difference(
    function: Callable[[Params, Tensor], Tensor], params: Params, lr: Tensor, h: float
) -> Any:
    """All partial derivatives, by the five-point stencil, whose error is of the fourth order in ``h``."""
    leaves, spec = tree.flatten((params, lr))
    flat = torch.cat([leaf.reshape(-1) for leaf in leaves])

    def at(numbers: Tensor) -> Tensor:
        parts = numbers.split([leaf.numel() for leaf in leaves])
        shaped = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        return function(*tree.unflatten(shaped, spec))

    directions = h * torch.eye(flat.numel(), dtype=flat.dtype)
    f = {k: vmap(at)(flat + k * directions) for k in (-2, -1, 1, 2)}
    slopes = (8 * (f[1] - f[-1]) - (f[2] - f[-2])) / (12 * h)
    parts = slopes.split([leaf.numel() for leaf in leaves])
    return tree.unflatten([part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)], spec)


@each_optimiser
def test_derivatives_through_inner_steps_are_finite_differences(make: Make) -> None:
    function, params, lr = objective(make, quartic), example_params(), torch.tensor(0.05).double()
    got = grad(function, argnums=(0, 1))(params, lr)
    assert_trees_close(got, central_difference(function, params, lr, h=1e-5), tolerance=1e-8)


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:FutureWarning"
)  # torch's own, in its jvp
@each_optimiser
def test_forward_and_reverse_derivatives_agree(make: Make) -> None:
    function, params, lr = objective(make, quartic), example_params(), torch.tensor(0.05).double()
    direction = next(example_grads(params, 1, seed=3))
    _, forward = jvp(lambda p: function(p, lr), (params,), (direction,))
    _, pull = vjp(lambda p: function(p, lr), params)
    assert_trees_close(forward, tree.dot(pull(torch.ones_like(forward))[0], direction), tolerance=1e-11)


COLD = {"a.w": torch.tensor([0.7, 0.0, 0.4]).double(), "b.w": torch.tensor(0.75).double()}


def one_zero_entry(params: Params) -> Tensor:
    """Its derivative to ``a.w[1]`` is exactly 0 at ``COLD``, and no longer after one step."""
    a, b = params["a.w"], params["b.w"]
    return 0.5 * a[1] ** 2 + 0.01 * a[1] * (b - 0.75) + (a[0] ** 2 + a[2] ** 4 + b**2 + a[0] * a[2] * b) / 2


SMOOTH = [
    pytest.param(make, id=name) for name, make in OPTIMISERS if name != "lion"
]  # lion: see its own test


@pytest.mark.parametrize("make", SMOOTH)
def test_a_zero_gradient_at_the_cold_start_has_the_right_derivative(make: Make) -> None:
    assert grad(one_zero_entry)(COLD)["a.w"][1] == 0
    function, lr = objective(make, one_zero_entry), torch.tensor(1e-3).double()
    got = grad(function, argnums=(0, 1))(COLD, lr)
    # The root bends within 1e-4, the square root of eps_root, and three steps magnify a shift of the start.
    assert_trees_close(got, central_difference(function, COLD, lr, h=3e-9), tolerance=1e-6)


ROOTED = [
    pytest.param(make, id=name) for name, make in OPTIMISERS if make(0.1).inner and name != "clipped-norm"
]


@pytest.mark.parametrize("make", ROOTED)
def test_the_outer_form_is_not_safe_there(make: Make) -> None:
    function, lr = objective(make, one_zero_entry, inner=False), torch.tensor(1e-3).double()
    slope = grad(function)(COLD, lr)["a.w"][1]
    # NaN; rmsprop-centered has a slope of 1 / eps or so, as the clamped variance passes no derivative at 0.
    assert not slope.abs() < 1e4, "if the outer form became safe, the inner one is not needed"


def test_the_rules_with_a_root_are_the_ones_with_an_inner_form() -> None:
    rooted = {name.split("-")[0] for name, make in OPTIMISERS if make(0.1).inner}
    assert rooted == {"adam", "amsgrad", "adamw", "rmsprop", "adagrad", "clipped", "masked"}


def test_clipping_a_zero_gradient_has_a_derivative_in_the_inner_form_only() -> None:
    params, lr = {"w": torch.zeros(3).double()}, torch.tensor(0.1).double()
    make: Make = lambda lr: optim.chain(optim.clip_by_norm(10.0), optim.sgd(lr))  # noqa: E731
    bowl: Loss = lambda p: (p["w"] ** 2).sum()  # noqa: E731
    assert grad(objective(make, bowl, inner=False))(params, lr)["w"].isnan().all()
    plain = objective(lambda lr: optim.sgd(lr), bowl)
    assert_trees_equal(grad(objective(make, bowl))(params, lr), grad(plain)(params, lr))


def test_an_eps_root_or_an_accumulator_of_ones_own_stays_in_an_inner_loop() -> None:
    params = example_params()
    for rule in (optim.adam(0.1, eps_root=1e-3), optim.adagrad(0.1, initial_accumulator=0.1)):
        assert rule.inner is None
        assert optim.as_inner(rule) is rule
    outer, _ = follow(optim.adam(0.1), params, example_grads(params, 3))
    inner, _ = follow(optim.as_inner(optim.adam(0.1)), params, example_grads(params, 3))
    named, _ = follow(optim.adam(0.1, eps_root=1e-8), params, example_grads(params, 3))
    assert_trees_equal(inner, named)
    assert not torch.equal(inner["gain"], outer["gain"])


def test_lion_passes_no_derivative_of_the_inner_gradients() -> None:
    params, lr, decay, steps = example_params(), torch.tensor(0.05).double(), 0.1, 3
    function = objective(lambda lr: optim.lion(lr, weight_decay=decay), quartic)
    adapted = unrolled(optim.lion(lr, weight_decay=decay), quartic, params)
    # Only the decay connects start and end: each step multiplies the parameters by 1 - lr * decay.
    shrunk = (1 - 0.05 * decay) ** steps
    want = {n: shrunk * (3 * (p - 0.3 * k) ** 2 + 1) for k, (n, p) in enumerate(adapted.items(), 1)}
    assert_trees_close(grad(function)(params, lr), want, tolerance=1e-7)  # lr came from float32


@pytest.mark.compiles
@each_optimiser
def test_compiled_is_eager_without_a_second_compilation(make: Make) -> None:
    torch.compiler.reset()
    params = example_params()
    rule = make(schedules.cosine(0.1, 10, warmup=2))
    compiled = torch.compile(rule.update, backend="aot_eager", fullgraph=True)
    state = rule.init(params)
    for call, grads in enumerate(example_grads(params, 3)):
        with torch.compiler.set_stance("fail_on_recompile" if call else "default"):
            got = compiled(grads, state, params)
        want = rule.update(grads, state, params)
        assert_trees_close(got, want, tolerance=1e-13)
        state, params = want[1], tree.add(params, want[0])


MADE_INSIDE = ("sgd-nesterov", "masked")  # the checks of all factories are shared


@pytest.mark.compiles
@pytest.mark.parametrize(
    "make", [pytest.param(make, id=name) for name, make in OPTIMISERS if name in MADE_INSIDE]
)
def test_a_rule_may_be_made_inside_a_compiled_function(make: Make) -> None:
    torch.compiler.reset()
    params, lr = example_params(), torch.tensor(0.1).double()
    grads = list(example_grads(params, 2))

    def two_steps(params: Params, lr: Tensor) -> Any:
        return follow(make(lr), params, iter(grads))

    got = torch.compile(two_steps, backend="aot_eager", fullgraph=True)(params, lr)
    assert_trees_close(got, two_steps(params, lr), tolerance=1e-13)


@each_optimiser
def test_a_traced_update_serves_every_step(make: Make) -> None:
    params = example_params()
    rule = make(schedules.step(0.1, 0.5, every=2))
    state = rule.init(params)
    graph = None
    for grads in example_grads(params, 5):
        graph = graph or make_fx(rule.update)(grads, state, params)
        want = rule.update(grads, state, params)
        assert_trees_equal(graph(grads, state, params), want)
        state, params = want[1], tree.add(params, want[0])
