"""Factors and systems of equations in our own kernels: torch's values and derivatives, for every task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from native_checks import build, check, numbers
from torch import Tensor
from torch.func import grad, jvp, vmap

from fmeta.functional import differentiable
from fmeta.functional.linalg import solve
from fmeta.parallel.native.ir import Unsupported

pytestmark = pytest.mark.compiles
TASKS = 3
EYE = torch.eye(4, dtype=torch.float64)
FIXED = numbers(4, 2, seed=5)


def positive(a: Tensor) -> Tensor:
    return a @ a.mT + EYE


SYSTEMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "solve": lambda a, b: solve(a, b),
    "rows exchanged": lambda a, b: solve(a.flip(-2), b),
    "a vector": lambda a, b: solve(a, b[..., 0]),
    "from the right": lambda a, b: solve(a, b.mT, left=False),
    "fixed side": lambda a, b: solve(a, FIXED),
    "fixed matrix": lambda a, b: solve(EYE.flip(0) + 0.1, b),
    "the same matrix twice": lambda a, b: solve(a, b) + solve(a, b * b),
    "a batch in a task": lambda a, b: solve(torch.stack([a, a.mT + EYE]), torch.stack([b, b.sin()])),
    "determinant": lambda a, b: torch.linalg.slogdet(a).logabsdet * b,
    "cholesky": lambda a, b: torch.linalg.cholesky(positive(a)) @ b,
    "cholesky, upper": lambda a, b: torch.linalg.cholesky(positive(a), upper=True) @ b,
    "by a factor": lambda a, b: torch.cholesky_solve(b, torch.linalg.cholesky(positive(a))),
    "triangular, upper": lambda a, b: torch.linalg.solve_triangular(a.triu() + EYE, b, upper=True),
    "triangular, right": lambda a, b: torch.linalg.solve_triangular(
        a.tril(), b.mT, upper=False, left=False, unitriangular=True
    ),
    "triangular, upper, right": lambda a, b: torch.linalg.solve_triangular(
        a.triu() + EYE, b.mT, upper=True, left=False
    ),
}


def system() -> tuple[Tensor, Tensor]:
    return numbers(TASKS, 4, 4) + 3 * EYE, numbers(TASKS, 4, 2, seed=1)


@pytest.mark.parametrize("name", SYSTEMS)
def test_systems_of_a_task(name: str) -> None:
    """Value, gradient, and gradient along a direction."""

    def every(a: Tensor, b: Tensor) -> Any:
        def of(a: Tensor, b: Tensor) -> Tensor:
            return SYSTEMS[name](a, b).square().sum()

        slope = vmap(grad(of, (0, 1)))
        with differentiable():
            value = vmap(SYSTEMS[name])(a, b)
            second = jvp(slope, (a, b), (b @ b.mT, a @ b))[1]
            return value, slope(a, b), second

    check(every, *system(), axes=(0, 0), within=1e-8)


def test_a_system_that_tasks_share() -> None:
    a, b = system()

    def fn(w: Tensor, b: Tensor) -> Any:
        loss = lambda w: vmap(lambda b: solve(w, b).square().sum())(b).mean()  # noqa: E731
        return loss(w), grad(loss)(w)

    check(fn, a[0], b, axes=(None, 0), within=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 7, 33, 100])
def test_systems_of_all_sizes(n: int, dtype: torch.dtype) -> None:
    a = numbers(TASKS, n, n, dtype=dtype) + (n**0.5 * torch.eye(n, dtype=dtype)).flip(0)
    b = numbers(TASKS, n, 3, dtype=dtype, seed=1)
    check(lambda a, b: vmap(solve)(a, b), a, b, axes=(0, 0), within=1e-3 if dtype == torch.float32 else 1e-10)


def test_a_large_system_is_left_to_others() -> None:
    large = numbers(TASKS, 300, 300) + 20 * torch.eye(300, dtype=torch.float64)
    with pytest.raises(Unsupported, match="a large one"):
        check(lambda a: vmap(lambda a: solve(a, a[:, 0]))(a), large, axes=(0,))


def test_a_matrix_without_an_inverse_is_not_finite() -> None:
    found = build(lambda a, b: vmap(solve)(a, b), *system(), axes=(0, 0))(
        torch.ones(TASKS, 4, 4).double(), system()[1]
    )
    assert not found.isfinite().any()
