"""Solvers, distances and scatters: torch's values, and right second derivatives in every nesting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from fmeta.functional import differentiable, linalg

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")

TASKS = N = 3  # equal on purpose: some of what torch gets wrong needs it
EYE = torch.eye(N, dtype=torch.float64)
FIXED = torch.linspace(-1, 1, N * 2, dtype=torch.float64).view(N, 2)
Inputs = tuple[Tensor, ...]


def draw(*shape: int) -> Tensor:
    return torch.randn(TASKS, *shape, dtype=torch.float64)


def regular() -> Inputs:
    return (draw(N, N) + 4 * EYE,)


def factor(a: Tensor) -> Tensor:
    return torch.linalg.cholesky(a @ a.mT + EYE)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[[], Inputs]]] = {
    "solve": (torch.linalg.solve, lambda: (*regular(), draw(N, 2))),
    "solve, vector": (torch.linalg.solve, lambda: (*regular(), draw(N))),
    "solve, from the right": (lambda a, b: torch.linalg.solve(a, b, left=False), lambda: (*regular(), draw(2, N))),
    "solve, fixed side": (lambda a: torch.linalg.solve(a, FIXED), regular),
    "solve, fixed matrix": (lambda b: torch.linalg.solve(EYE + 1, b), lambda: (draw(N, 2),)),
    "solve, batch": (torch.linalg.solve, lambda: (draw(2, N, N) + 4 * EYE, draw(2, N, 3))),
    "slogdet": (lambda a: torch.linalg.slogdet(a).logabsdet, regular),
    "slogdet, method": (lambda a: a.slogdet()[0] * a.slogdet()[1], lambda: (-regular()[0],)),
    "logdet": (lambda a: torch.logdet(a @ a.mT + EYE), regular),
    "cholesky_solve": (lambda a, b: torch.cholesky_solve(b, factor(a)), lambda: (*regular(), draw(N, 2))),
    "cholesky_solve, fixed side": (lambda a: FIXED.cholesky_solve(factor(a)), regular),
    "cholesky_solve, fixed square": (lambda a: torch.cholesky_solve(2 * EYE, factor(a)), regular),
    "cholesky_solve, upper": (lambda a: torch.cholesky_solve(FIXED, factor(a).mT, upper=True), regular),
    "cholesky_inverse": (lambda a: torch.cholesky_inverse(factor(a)), regular),
    "cholesky_inverse, upper": (lambda a: factor(a).mT.cholesky_inverse(upper=True), regular),
    "cdist": (torch.cdist, lambda: (draw(5, 3), draw(4, 3))),
    "cdist, itself": (lambda a: torch.cdist(a, a), lambda: (draw(5, 3),)),
    "cdist, p": (lambda a, b: torch.cdist(a, b, p=3.0), lambda: (draw(2, 5, 3), draw(2, 4, 3))),
    "select_scatter": (lambda a, b: a.select_scatter(b, 0, 1), lambda: (draw(5, 3), draw(3))),
    "select_scatter, last": (lambda a, b: torch.select_scatter(a, b, -1, -1), lambda: (draw(5, 3), draw(5))),
    "index_fill, fixed input": (lambda b: FIXED.index_fill(0, torch.tensor([0, 2]), b), lambda: (draw(),)),
    "index_fill": (lambda a, b: a.index_fill(1, torch.tensor([0, 2]), b), lambda: (draw(5, 3), draw())),
    "index_fill, number": (lambda a: torch.index_fill(a, 0, torch.tensor(-1), 0.5), lambda: (draw(5, 3),)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_values_equal_those_of_torch(name: str) -> None:
    function, make = CASES[name]
    inputs = [leaf[0] for leaf in make()]
    want = function(*inputs)
    with differentiable():
        got = function(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_a_negative_determinant_has_no_logarithm() -> None:
    a = torch.diag(torch.tensor([-1.0, 2.0]))
    assert linalg.logdet(a).isnan() and torch.logdet(a).isnan()
    assert type(linalg.slogdet(a)) is type(torch.linalg.slogdet(a))
    torch.testing.assert_close(tuple(linalg.slogdet(a)), tuple(torch.linalg.slogdet(a)))


def second_derivatives(f: Callable[..., Tensor], inputs: Inputs, v: Inputs) -> dict[str, Inputs]:
    """``H v`` of every task in three nestings."""
    which = tuple(range(len(inputs)))
    slopes = lambda *x: vmap(grad(f, argnums=which))(*x)  # noqa: E731
    along = lambda *x: sum((g * w).sum() for g, w in zip(slopes(*x), v, strict=True))  # noqa: E731
    tangent = lambda *both: jvp(f, both[: len(v)], both[len(v) :])[1]  # noqa: E731
    return {
        "jvp(vmap(grad))": jvp(slopes, inputs, v)[1],
        "grad(vmap(grad))": grad(along, argnums=which)(*inputs),
        "grad(vmap(jvp))": grad(lambda *x: vmap(tangent)(*x, *v).sum(), argnums=which)(*inputs),
    }


def errors(name: str) -> dict[str, float]:
    """Relative difference of each nesting from central differences of the gradient."""
    function, make = CASES[name]
    f = lambda *x: (torch.sin(function(*x)) + function(*x) ** 2).sum()  # noqa: E731
    inputs = make()
    v, h = tuple(torch.randn_like(x) for x in inputs), 1e-6
    slopes = vmap(grad(f, argnums=tuple(range(len(v)))))
    up, down = (slopes(*(x + s * h * w for x, w in zip(inputs, v, strict=True))) for s in (1, -1))
    want = [(a - b) / (2 * h) for a, b in zip(up, down, strict=True)]
    scale = max(w.abs().max() for w in want)
    return {
        nesting: float(max((a - b).abs().max() for a, b in zip(got, want, strict=True)) / scale)
        for nesting, got in second_derivatives(f, inputs, v).items()
    }


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_equal_differences(name: str) -> None:
    with differentiable():
        found = errors(name)
    assert max(found.values()) < 1e-7, found


@pytest.mark.parametrize(
    ("name", "nesting"),
    [
        ("solve", "grad(vmap(jvp))"),
        ("slogdet", "grad(vmap(jvp))"),
        ("logdet", "grad(vmap(jvp))"),
        ("cholesky_solve, fixed square", "jvp(vmap(grad))"),
        ("cholesky_inverse", "jvp(vmap(grad))"),
        ("select_scatter", "grad(vmap(grad))"),
        ("index_fill, fixed input", "grad(vmap(grad))"),
    ],
)
def test_torch_is_wrong(name: str, nesting: str) -> None:
    """When this fails, torch has been repaired, and the rewrite can go."""
    assert errors(name)[nesting] > 1e-3


def test_torch_has_no_forward_mode_for_distances() -> None:
    """When this fails, torch has been repaired, and the rewrite can go."""
    a: Any = torch.randn(3, 2)
    with pytest.raises(NotImplementedError, match="_cdist_forward"):
        jvp(lambda a: torch.cdist(a, a), (a,), (a,))


def test_equal_points_have_no_slope() -> None:
    a = torch.zeros(2, 3)
    with differentiable():
        assert grad(lambda a: torch.cdist(a, a).sum())(a).abs().max() == 0
