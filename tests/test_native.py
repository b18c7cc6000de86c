"""Kernels of our own for a CPU: operation by operation the numbers of torch, for any number of tasks."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, Case, each
from helpers import assert_trees_close, assert_trees_equal
from native_checks import build, check, numbers
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn import functional as F

import fmeta
from fmeta import Plan
from fmeta.parallel import kernels
from fmeta.parallel.mode import is_small, out_of_memory
from fmeta.parallel.native import build as build_module
from fmeta.parallel.native.ir import Unsupported

pytestmark = pytest.mark.compiles
TASKS = 3
CALLER = build_module.caller


ONE = {
    name: getattr(torch, name)
    for name in (
        "neg abs exp expm1 sin cos tanh sigmoid erf floor ceil round sign relu square atan sinh cosh "
        "isnan isfinite trunc frac"
    ).split()
} | {
    "log": lambda x: torch.log(x.abs() + 0.1),
    "log1p": lambda x: torch.log1p(x.abs()),
    "sqrt": lambda x: x.abs().sqrt(),
    "rsqrt": lambda x: (x.abs() + 0.1).rsqrt(),
    "reciprocal": lambda x: (x + 9).reciprocal(),
    "asin": lambda x: torch.asin(x.clamp(-0.9, 0.9)),
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "clamp below": lambda x: x.clamp(min=-0.5),
    "powers": lambda x: x**2 + x**3 + (x.abs() + 0.1) ** 0.5 + (x.abs() + 0.1) ** 1.7 + (x + 9) ** -1,
    "leaky relu": lambda x: F.leaky_relu(x, 0.2),
    "elu": F.elu,
    "gelu": F.gelu,
    "silu": F.silu,
    "softplus": F.softplus,
    "hardtanh": F.hardtanh,
    "mish": F.mish,
    "log softmax": lambda x: F.log_softmax(x, -1),
    "softmax": lambda x: F.softmax(x, 0),
    "logsumexp": lambda x: torch.logsumexp(x, 0),
    "layer norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "where": lambda x: torch.where(x > 0, x * 2, -x),
    "to int and back": lambda x: (x * 3).long().double() + (x > 0).double(),
    "remainder": lambda x: torch.remainder(x, 0.7) + torch.fmod(x, 0.7),
    "flip": lambda x: x.flip(0, 1) * 2,
    "flags": lambda x: ((x > 0) & (x < 1)) | ~(x <= 0.5),
    "norm": lambda x: torch.linalg.vector_norm(x),
}
"""Functions of a tensor of one task."""

REDUCTIONS = {
    f"{name} {dim}": functools.partial(lambda x, f, d: getattr(torch, f)(x, d), f=name, d=dim)
    for name in ("sum", "mean", "amax", "amin", "argmax")
    for dim in (0, 1)
} | {
    "sum": torch.sum,
    "mean": torch.mean,
    "all": lambda x: (x > -9).all(),
    "any": lambda x: (x > 9).any(),
    "prod": lambda x: x.prod(),
    "var": lambda x: x.var(0),
    "std": lambda x: x.std(1),
    "max": lambda x: x.max() - x.min(),
    "max and where": lambda x: x.max(1),
    "min and where, of rounded": lambda x: x.round().min(0, keepdim=True),
    "sorted": lambda x: x.sort(1),
    "sorted, falling": lambda x: x.round().sort(0, descending=True)[0],
    "summed up": lambda x: x.cumsum(0) + x.flip(1).cumsum(1) + x.cumprod(1),
}

SHAPES = {
    "transposed": lambda x: x.mT * 2,
    "flat": lambda x: x.mT.reshape(-1) + 1,
    "cat": lambda x: torch.cat([x, x * 2, x[:1]], 0),
    "stack": lambda x: torch.stack([x, x + 1], 1),
    "slices": lambda x: x[1:, ::2] - x[:-1, 1::2],
    "one": lambda x: x[1] * x[:, 0].sum(),
    "split": lambda x: x.split(2, 1)[1] * 2,
    "unbound": lambda x: x.unbind(0)[2] + 1,
    "padded": lambda x: F.pad(x, (1, 2, 0, 1), value=0.5),
    "cropped": lambda x: F.pad(x, (-1, 1)),
    "unsqueezed": lambda x: (x[None] * x[:, None]).squeeze(),
    "expanded": lambda x: x[0].expand(5, -1).sum(0),
    "zeros": lambda x: torch.zeros_like(x) * x + torch.ones_like(x),
    "arange": lambda x: x * torch.arange(x.shape[1], dtype=x.dtype),
    "ones": lambda x: x @ torch.ones(x.shape[1], 2, dtype=x.dtype),
    "eye": lambda x: x @ torch.eye(x.shape[1], 3, dtype=x.dtype),
    "slices replaced": lambda x: torch.slice_scatter(x, x[:, 1:3] + 1, 1, 2, 6, 2).slice_scatter(
        x[:1] * 2, 0, 1, 2
    ),
    "diagonal": lambda x: x.diagonal() + x.diagonal(-1)[:1] + x[None, :, 2:].diagonal(1, 1, 2).sum(),
    "diagonal, added to": lambda x: x[:, :4].clone().diagonal().add_(1.0),
    "a matrix of its diagonal": lambda x: torch.diag_embed(x, 1) @ torch.diag_embed(x[0], -1),
    "unchanged": lambda x: x,
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
}


@pytest.mark.parametrize("table", [ONE, REDUCTIONS, SHAPES], ids=["numbers", "reductions", "shapes"])
def test_operations_of_a_task(table: dict[str, Callable[[Tensor], Tensor]]) -> None:
    def every(x: Tensor) -> dict[str, Any]:
        return {name: vmap(f)(x) for name, f in table.items()}

    check(every, numbers(TASKS, 4, 6), axes=(0,))


@pytest.mark.parametrize("names", [list(ONE)[:22], list(ONE)[22:]], ids=["first", "second"])
def test_derivatives_of_a_task(names: list[str]) -> None:
    """First and second derivatives, the second along a direction."""
    smooth = [n for n in names if n not in ("isnan", "isfinite", "flags")]

    def every(x: Tensor, v: Tensor) -> dict[str, Any]:
        def of(f: Callable[[Tensor], Tensor]) -> Any:
            slope = grad(lambda x: (f(x) * f(x)).sum())
            return vmap(slope)(x), jvp(vmap(slope), (x,), (v,))[1]

        with fmeta.functional.differentiable():
            return {name: of(ONE[name]) for name in smooth}

    check(every, numbers(TASKS, 3, 5), numbers(TASKS, 3, 5, seed=1), axes=(0, 0), within=1e-9)


def test_derivatives_of_choices() -> None:
    """Of the largest, of numbers in order, of diagonals, and of slices."""

    def one(x: Tensor) -> Tensor:
        ordered = x.sort(1, descending=True)[0].cumsum(1)[:, 2] * x.max(0)[0][:4]
        apart = (x[1:, ::2] * x[:-1, 1:6:2]).sum() + x[0, 2:].exp().prod()
        return (
            (ordered * x[:, 1:5].diagonal()).sum()
            + apart
            + (x.max() * torch.diag_embed(x, 1)[0]).square().sum()
        )

    check(
        lambda x: vmap(grad(lambda x: grad(one)(x).square().sum()))(x),
        numbers(TASKS, 4, 6),
        axes=(0,),
        within=1e-9,
    )


def test_sums_over_tasks() -> None:
    def fn(w: Tensor, x: Tensor) -> Any:
        y = vmap(lambda x: x @ w)(x)
        shared = (w * 2).sum(0)
        whole = grad(lambda w: vmap(lambda x: (x @ w).tanh().sum())(x).mean())(w)
        centred = y - y.mean(0)  # a second loop over tasks
        return whole, y.sum((0, 1)), y.mean(), shared, centred, (y > -9).all(), y.amax((0, 2)), whole.norm()

    check(fn, numbers(5, 7), numbers(TASKS, 4, 5), axes=(None, 0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_products_of_all_sizes(dtype: torch.dtype) -> None:
    """Blocks and what is left over, either operand transposed, of a task's own or shared."""
    sizes = [(1, 3, 5), (4, 1, 40), (5, 9, 1), (7, 40, 13), (33, 17, 9), (13, 8, 64), (20, 65, 31)]
    made = [(numbers(TASKS, m, k, dtype=dtype), numbers(k, n, dtype=dtype)) for m, k, n in sizes]

    def fn(pairs: list[Any], shared: list[Any]) -> list[Tensor]:
        out = []
        for a, b in zip(pairs, shared, strict=True):
            own = a.mT.contiguous() * 0.5
            out += [a @ b, (b.mT @ own), vmap(lambda a: a @ a.mT)(a), vmap(lambda a: a.mT @ a)(a)]
            out += [a.flatten(0, 1).mT @ a.flatten(0, 1), torch.baddbmm(a[:, :1, :1], a, own)]
        return out

    within = 1e-11 if dtype == torch.float64 else 2e-4
    check(fn, [a for a, _ in made], [b for _, b in made], axes=(0, None), within=within)


CONVOLUTIONS = [
    dict(size=(7, 6), c=3, f=4, k=(3, 3), stride=2, padding=1),
    dict(size=(1, 5), c=3, f=2, k=(3, 3), stride=1, padding=1),
    dict(size=(6, 6), c=1, f=9, k=(3, 3), stride=1, padding=1),
    dict(size=(5, 8), c=2, f=3, k=(1, 1), stride=1, padding=0),
    dict(size=(9, 7), c=2, f=3, k=(2, 3), stride=(3, 1), padding=(0, 2)),
    dict(size=(8, 8), c=2, f=2, k=(1, 1), stride=2, padding=0),
    dict(size=(6, 7), c=4, f=6, k=(3, 2), stride=1, padding=1, groups=2),
    dict(size=(9, 9), c=2, f=3, k=(5, 5), stride=2, padding=2),
]


@pytest.mark.parametrize("setting", CONVOLUTIONS, ids=str)
def test_convolutions_and_their_derivatives(setting: dict[str, Any]) -> None:
    """Weights shared and of each task, as the engine meets them: the gradient, and its derivative along a direction."""
    groups = setting.get("groups", 1)
    x = numbers(TASKS, 2, setting["c"], *setting["size"])
    w = numbers(setting["f"], setting["c"] // groups, *setting["k"])
    v = numbers(TASKS, *w.shape, seed=3)

    def loss(w: Tensor, x: Tensor) -> Tensor:
        y = F.conv2d(x, w, None, setting["stride"], setting["padding"], 1, groups).tanh()
        return (y * y).sum()

    def fn(w: Tensor, v: Tensor, x: Tensor) -> Any:
        with fmeta.functional.differentiable():
            shared = vmap(grad(loss, (0, 1)), (None, 0))(w, x)
            own = vmap(grad(loss, (0, 1)))(v, x)
            across = grad(lambda w: vmap(lambda v, x: jvp(lambda w: loss(w, x), (w,), (v,))[1])(v, x).sum())(
                w
            )
        return shared, own, across

    check(fn, w, v, x, axes=(None, 0, 0), within=1e-9)


def test_convolutions_with_groups_or_dilation_forward() -> None:
    def fn(w: Tensor, d: Tensor, x: Tensor) -> Any:
        return (
            vmap(lambda x: F.conv2d(x, w, torch.ones(4, dtype=x.dtype), padding=1, groups=2))(x),
            vmap(lambda x: F.conv2d(x, d, dilation=2, stride=2))(x),
        )

    check(fn, numbers(4, 2, 3, 3), numbers(3, 4, 2, 2), numbers(TASKS, 2, 4, 7, 8), axes=(None, None, 0))


def test_pooling_and_its_derivatives() -> None:
    def loss(x: Tensor) -> Tensor:
        return (F.max_pool2d(x.tanh(), 2) ** 2).sum() + (F.max_pool2d(x, 3, 2, 1) * x.mean()).sum()

    def fn(x: Tensor, v: Tensor) -> Any:
        with fmeta.functional.differentiable():
            return vmap(loss)(x), jvp(vmap(grad(loss)), (x,), (v,))

    check(fn, numbers(TASKS, 2, 3, 8, 6), numbers(TASKS, 2, 3, 8, 6, seed=1), axes=(0, 0))


def test_numbers_by_index() -> None:
    """Embeddings, shared and of each task, labels, a step's own rate; and gradients back to them."""

    def loss(table: Tensor, words: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.embedding(words, table).mean(1), labels)

    words = torch.randint(0, 6, (TASKS, 4, 6), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 5, (TASKS, 4), generator=torch.Generator().manual_seed(1))
    args = numbers(6, 5), torch.tensor(2), words, labels

    def one(table: Tensor, k: Tensor, words: Tensor, labels: Tensor) -> Any:
        with fmeta.functional.differentiable():
            value = vmap(grad(loss), (None, 0, 0))(table, words, labels)
        return value, table.index_select(0, k[None]), table[k[None]], words.gather(2, labels[:, :, None])

    check(one, *args, axes=(None, None, 0, 0))

    def each(tables: Tensor, words: Tensor, labels: Tensor) -> Any:
        with fmeta.functional.differentiable():
            return vmap(grad(loss))(tables, words, labels)

    check(each, numbers(TASKS, 6, 5), words, labels, axes=(0, 0, 0))


def test_an_index_out_of_range_raises() -> None:
    call = build(lambda table, i: table[i[None]], numbers(6, 5), torch.tensor(2), axes=(None, None))
    with pytest.raises(IndexError, match="out of bounds"):
        call(numbers(6, 5), torch.tensor(6))


@pytest.mark.parametrize(
    ("name", "reach"), [("exp", 80.0), ("tanh", 12.0), ("sigmoid", 80.0)], ids=["exp", "tanh", "sigmoid"]
)
def test_float32_functions_are_as_exact_as_torch(name: str, reach: float) -> None:
    """Written out so that they vectorise: within a few units in the last place, and right at the ends."""
    ends = torch.tensor(
        [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-20, 1e-40, 88.0, 89.5, -87.5, -95.0, -104.5]
    )
    x = torch.cat([torch.linspace(-reach, reach, 20001), torch.linspace(-0.2, 0.2, 2001), ends])
    call = build(lambda x: getattr(torch, name)(x), x, axes=(None,))
    got, want = call(x), getattr(torch, name)(x.double())
    normal = torch.isfinite(want) & (want.abs() < 3e38) & (want.abs() > 1.2e-38)
    error = (got.double() - want).abs()[normal] / want.abs()[normal]
    assert error.max() < 6e-7
    torch.testing.assert_close(got[-len(ends) :][2:5], want[-len(ends) :][2:5].float(), equal_nan=True)


def test_what_is_changed_in_place() -> None:
    """A copy from before a change keeps its numbers; a view of what changes follows."""

    def fn(x: Tensor) -> Any:
        y = x * 2
        before, row = y.clone(), y[:, 0]
        y.div_(x.abs() + 1)
        y[:, 1].copy_(x[:, 0])
        return before, row, y, y.sum()

    check(fn, numbers(TASKS, 4, 6), axes=(0,))


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": lambda y: y.clone(),
    "clone of a row": lambda y: y[:1].clone(),
    "clone of a slice": lambda y: y[1:].clone()[:1],
    "clone across": lambda y: y.t().clone().t(),
    "clone of a view": lambda y: y.view(-1).clone().view(y.shape),
    "clone of a share": lambda y: y.split(1)[0].clone(),
    "clone of a detached one": lambda y: y.detach().clone(),
    "contiguous across": lambda y: y.t().contiguous().t(),
    "reshaped across": lambda y: y.t().reshape(-1).reshape(y.shape[1], y.shape[0]).t(),
    "flip": lambda y: y.flip(0),
    "plus 0": lambda y: y + 0.0,
    "times 1": lambda y: y * 1.0,
    "over 1": lambda y: y / 1,
    "power 1": lambda y: y**1,
    "padded by nothing": lambda y: F.pad(y, (0, 0)),
    "chosen": lambda y: torch.where(torch.ones((), dtype=torch.bool), y, y + 1),
    "a sum of one": lambda y: y[None].sum(0),
    "mapped": lambda y: y.exp(),
}
CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "all of it": lambda y: y.mul_(2),
    "a part": lambda y: y[1:].zero_(),
    "a column": lambda y: y[:, 0].copy_(y[:, 1] * 3),
    "across": lambda y: y.t()[0].add_(5),
    "by a view": lambda y: y.view(-1)[:3].zero_(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_copies_keep_what_is_changed_afterwards(change: str) -> None:
    """Whatever makes the copy, also where it computes nothing; and a copy that is changed leaves its source."""

    def after(copy: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def fn(x: Tensor) -> Tensor:
            y = x * 2
            kept = copy(y)
            CHANGES[change](y)
            return kept + 0.5 * y

        return fn

    def before(copy: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def fn(x: Tensor) -> Tensor:
            y = x * 2
            changed = copy(y).expand(4, 6).clone(memory_format=torch.contiguous_format)
            CHANGES[change](changed)
            return changed + 0.5 * y

        return fn

    def shifted(x: Tensor) -> Tensor:
        y = x * 2
        y[1:] = y[:-1].clone()
        y[0], y[1] = y[1].clone(), y[0].clone()
        return y

    fns = [shifted, *(turn(copy) for turn in (after, before) for copy in COPIES.values())]
    check(lambda x: [vmap(fn)(x) for fn in fns], numbers(TASKS, 4, 6), axes=(0,))


def test_numbers_that_are_no_numbers_stay() -> None:
    """Zero times infinity; truth of fractions; quotients that round up to a whole number; constants that are NaN."""
    special = [0.0, -0.0, 0.5, -0.5, 1.0, 3.0, -3.0, 0.1, 7.25, math.inf, -math.inf, math.nan]

    def fn(x: Tensor, y: Tensor) -> Any:
        pairs = (torch.logical_and, torch.logical_or, torch.logical_xor, torch.floor_divide, torch.fmod)
        zero = torch.zeros(())
        return [
            *(pair(x, y) for pair in pairs),
            torch.logical_not(x),
            *(0.0 * x, x * zero, zero / x, torch.zeros_like(x) * x),
            torch.where(x > 0, x, math.nan),
            torch.roll(x, 1, 0),
        ]

    for dtype in (torch.float32, torch.float64):
        x = torch.tensor(special, dtype=dtype)[:, None].expand(12, 12).contiguous()
        check(fn, x, x.t().contiguous(), axes=(None, None))
    whole = torch.arange(-5, 6)
    check(lambda x: torch.fmod(x, 3), whole, axes=(None,))


@pytest.mark.parametrize("width", [5, 32])
def test_parts_of_a_tensor_are_written_in_their_order(width: int) -> None:
    """Those that lie apart may be written by one loop; those that overlap, or that are read between, may not."""

    def fn(x: Tensor) -> Any:
        a, b, c = x.unbind(1)
        apart = torch.stack([a * 2, b.tanh(), c + a, torch.rsqrt(c * c + 1)], 1)
        beside = torch.cat([a.exp(), b * b], 1)
        over = torch.zeros_like(apart)
        over[:, 0].copy_(a + 1)
        over[:, 0:2].copy_(apart[:, 2:4])
        over[:, 1].copy_(b - c)
        before = over[:, 1] * 2
        over[:, 1, 1:].copy_(a[:, :-1] * 3)
        over[:, 3].copy_(over[:, 1] + over[:, 0])
        return apart, beside, over, before, (apart * over).sum()

    check(fn, numbers(TASKS, 3, width), axes=(0,))
    check(fn, numbers(TASKS, 3, width, dtype=torch.float32), axes=(0,), within=1e-5)


def test_one_of_several_results_is_changed_in_place() -> None:
    """The same operation on the same numbers afterwards is not."""

    def fn(x: Tensor) -> Any:
        y = x.sort(1)[0].mul_(2)
        y[:, 0] += x[:, 1]
        return y, x.sort(1)[0], x.max(1)[0].add_(1), x.max(1)[0]

    check(lambda x: vmap(fn)(x), numbers(TASKS, 4, 6), axes=(0,))


REFUSED = {
    "a sort of tasks": (lambda x: x.sort(0)[0], (0,)),
    "a task picked": (lambda x: x[0], (0,)),
    "tasks reversed": (lambda x: x.flip(0), (0,)),
    "tasks in the middle": (lambda x: x.transpose(0, 1).reshape(-1), (0,)),
    "half precision": (lambda x: x.half() * 2, (0,)),
    "a program by tasks": (lambda x: x * 2 if len(x) == 2 else x + 1 - 3, (0,)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused(name: str) -> None:
    fn, axes = REFUSED[name]
    with pytest.raises(Unsupported):
        build(fn, numbers(TASKS, 4, 6), axes=axes)


def program(seed: int) -> Callable[..., Any]:
    """A random program on a shared matrix, a task's matrix and a task's vector."""
    draw = random.Random(seed)

    def fn(w: Tensor, x: Tensor, b: Tensor) -> Any:
        def one(x: Tensor, b: Tensor) -> Any:
            pool = [w, x, b, x.mT, w[:, 1:4] * 2]
            for _ in range(25):
                p, q = draw.choice(pool), draw.choice(pool)
                kind = draw.randrange(8)
                if kind == 0 and p.ndim == q.ndim == 2:
                    new = p @ (q if q.shape[0] == p.shape[1] else q.mT if q.shape[1] == p.shape[1] else p.mT)
                    new = new / 5
                elif kind == 1:
                    new = p.sum(draw.randrange(p.ndim)) if p.ndim else p
                elif kind == 2:
                    new = p.tanh() * 1.5 if p.ndim else p + 1
                elif kind == 3:
                    new = p.mT if p.ndim == 2 else p.flip(()) if p.ndim else p * 2
                elif kind == 4 and p.ndim == q.ndim and p.shape[-1:] == q.shape[-1:] and p.ndim == 2:
                    new = torch.cat([p, q])[: draw.randrange(2, 9)]
                elif kind == 5 and p.shape == q.shape:
                    new = torch.where(p > q, p, q * 0.5)
                elif kind == 6 and p.ndim == 2:
                    new = (p - p.mean(0)) / (p.var(1, keepdim=True) + 1).sqrt()
                else:
                    new = p * q if p.ndim == 0 or q.ndim == 0 or p.shape == q.shape else p.relu() - 0.3
                pool.append(new)
            return pool[5:]

        state = draw.getstate()

        def again(x: Tensor, b: Tensor) -> Any:
            draw.setstate(state)
            return one(x, b)

        values = vmap(again)(x, b)
        total = sum(v.sum() for v in values)
        return values, total

    start = draw.getstate()

    def repeated(*args: Tensor) -> Any:
        draw.setstate(start)
        return fn(*args)

    return repeated


@pytest.mark.parametrize("seed", range(12))
def test_random_programs(seed: int) -> None:
    """Whatever the order of loops and the reuse of memory, the numbers are those of torch."""
    check(
        program(seed), numbers(4, 5), numbers(TASKS, 6, 5), numbers(TASKS, 5), axes=(None, 0, 0), within=1e-9
    )


def test_threads_change_rounding_only() -> None:
    def fn(w: Tensor, x: Tensor) -> Tensor:
        return grad(lambda w: vmap(lambda x: (x @ w).tanh().sum())(x).mean())(w)

    w, x = numbers(9, 17), numbers(64, 8, 9)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(build(fn, w, x, axes=(None, 0))(w, x))
    finally:
        torch.set_num_threads(before)
    for a, b in itertools.pairwise(found):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@each([case for case in CASES if case.compiled])
def test_the_kernels_of_every_case_are_our_own(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[str] = []
    monkeypatch.setattr(kernels, "by_inductor", lambda fn, *args: others.append(fn.__name__))
    algorithm, meta, tasks = case.make()
    found: list[Any] = []
    monkeypatch.setattr(build_module, "caller", lambda *args: found.append(args) or CALLER(*args))
    got = fmeta.meta_grad(algorithm, Plan(compile=True))(meta, tasks)
    assert found and not others
    assert_trees_close(got, fmeta.meta_grad(algorithm, Plan(compile=False))(meta, tasks), 1e-9)


def test_inductor_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMETA_COMPILER", "inductor")
    monkeypatch.setattr(build_module, "caller", lambda *args: pytest.fail("not inductor"))
    algorithm, meta, tasks = next(case for case in CASES if case.compiled).make()
    got = fmeta.meta_grad(algorithm, Plan(compile=True))(meta, tasks)
    assert_trees_close(got, fmeta.meta_grad(algorithm, Plan(compile=False))(meta, tasks), 1e-9)


def test_where_our_own_kernels_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler, with one that fails, and with more threads than tasks can use."""
    x = numbers(TASKS, 4, 6)
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "compiler", lambda: None)
        with pytest.raises(Unsupported, match="no C"):
            build(lambda x: x * 2.5, x, axes=(0,))
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "compiler", lambda: "false")
        with pytest.raises(Unsupported, match="compiler failed"):
            build(lambda x: x * 2.625, x, axes=(0,))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 7)
        with pytest.raises(Unsupported, match="too few tasks"):
            build(lambda x: x * 2.75, x, axes=(0,))


def test_a_kernel_without_memory_raises_what_halves_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "library", lambda text: lambda *args: 2)
    call = build(lambda x: x * 2.875, numbers(TASKS, 4, 6), axes=(0,))
    with pytest.raises(RuntimeError) as error:
        call(numbers(TASKS, 4, 6))
    assert out_of_memory(error.value)


def test_large_steps_are_one_kernel_where_they_are_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert is_small(Plan(), cpu, 1e12)
    assert not is_small(Plan(precision="bf16"), cpu, 1e12)
    assert is_small(Plan(precision="bf16"), cpu, 1e6)
    assert not is_small(Plan(), torch.device("cuda"), 1e12)
    monkeypatch.setenv("FMETA_COMPILER", "inductor")
    assert not is_small(Plan(), cpu, 1e12)


@pytest.mark.parametrize("name", ["log", "rsqrt"])
def test_written_out_functions_of_single_precision(name: str) -> None:
    """Within two units in the last place of the true value, from the smallest number to the largest."""
    fn = getattr(torch, name)
    exponents = torch.linspace(-44.8, 38.5, 40_001, dtype=torch.float64)
    x = torch.cat([10**exponents, 1 + torch.linspace(-0.4, 0.4, 20_001, dtype=torch.float64)]).float()
    special = torch.tensor([0.0, -0.0, -1.0, -1e-40, torch.inf, -torch.inf, torch.nan, 1.0])
    kernel = kernels.Kernel(name, fn, fmeta.Plan(compile=True))
    got, want = kernel(x), fn(x.double())
    step = torch.finfo(torch.float32).eps * want.abs()
    near_one = 1e-9 if name == "log" else 0.0
    assert ((got.double() - want).abs() <= 2 * step + near_one).all()
    assert torch.equal(kernel(special).nan_to_num(7.0), fn(special).nan_to_num(7.0))


def test_a_single_condition_for_a_whole_tensor() -> None:
    """Chosen by masks, so that the loop is vectorised: NaN and infinity on either side stay what they are."""

    def pick(fine: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.where(fine, a, b), torch.where(fine, 2 * a, 0.0) + 1

    kernel = kernels.Kernel("pick", pick, fmeta.Plan(compile=True))
    for dtype in (torch.float32, torch.float64):
        a = torch.tensor([1.0, -0.0, torch.nan, torch.inf], dtype=dtype)
        b = torch.tensor([torch.nan, 3.0, -torch.inf, 4.0], dtype=dtype)
        for fine in (torch.tensor(True), torch.tensor(False)):
            assert_trees_equal(kernel(fine, a, b), pick(fine, a, b))
