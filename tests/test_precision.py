"""``Plan(precision=...)``: losses in half precision, everything else in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fmeta
from fmeta import Algorithm, Batch, Plan, Task
from fmeta.parallel.precision import DTYPES, lowered
from fmeta.parallel.steps import Steps
from fmeta.parallel.traits import Traits

TOLERANCE = {"bf16": 1e-2, "fp16": 2e-3}
"""Of the whole gradient vector, relative, against float64 (3e-3 and 5e-4 measured; float32 is at 1e-7)."""
HALF = ("bf16", "fp16")


def examples(count: int, seed: int) -> Batch:
    """Small pictures of three classes that differ in their brightness, ``[16 tasks, count, 1, 6, 6]``."""
    y = torch.arange(count).remainder(3).expand(16, count)
    noise = torch.randn(16, count, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    return Batch(noise + y[..., None, None, None] - 1, y)


def smooth() -> nn.Module:
    """At a kink of ReLU rounding moves a derivative by far more than rounding."""
    torch.manual_seed(0)
    return fmeta.models.mlp([1, 40, 40, 1], activation=nn.Tanh)


SINES = fmeta.tasks.sinusoid(tasks=32, shots=10, queries=10)


def waves(steps: int = 2) -> tuple[Algorithm, Any, Task]:
    apply, params = fmeta.functionalize(smooth())
    algorithm = fmeta.maml(fmeta.losses.mse(apply), fmeta.sgd(0.01), steps=steps)
    return algorithm, params, SINES(0, 0)


def pictures() -> tuple[Algorithm, Any, Task]:
    """Convolutions with BatchNorm between them."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.Tanh(),
    ]
    module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 3))
    apply, params = fmeta.functionalize(module)
    algorithm = fmeta.maml(fmeta.losses.cross_entropy(apply), fmeta.sgd(0.1), steps=2)
    return algorithm, params, Task(examples(6, 0), examples(9, 1))


def rates() -> tuple[Algorithm, Any, Task]:
    """Meta-SGD: the update reads meta."""
    apply, params = fmeta.functionalize(smooth())
    algorithm = fmeta.metasgd(fmeta.losses.mse(apply), steps=2)
    return algorithm, algorithm.init(params), SINES(0, 0)


def head() -> tuple[Algorithm, Any, Task]:
    """ANIL: both losses read meta."""
    apply, params = fmeta.functionalize(smooth())
    algorithm = fmeta.anil(fmeta.losses.mse(apply), fmeta.sgd(0.01), steps=2, adapts="head")
    return algorithm, algorithm.init(params), SINES(0, 0)


PROBLEMS = {"mlp": waves, "convnet": pictures, "metasgd": rates, "anil": head}


def wide(values: Any) -> Any:
    return fmeta.tree.map(lambda x: x.double() if x.is_floating_point() else x, values)


def error(got: Any, want: Any) -> float:
    """Distance of two gradients over the length of the second."""
    a = torch.cat([leaf.double().flatten() for leaf in fmeta.tree.leaves(got)])
    b = torch.cat([leaf.double().flatten() for leaf in fmeta.tree.leaves(want)])
    return ((a - b).norm() / b.norm()).item()


def half_plans() -> list[Any]:
    plans = [Plan(precision=p, compile=False) for p in HALF]
    plans += [
        Plan(precision="bf16", engine="nested"),
        Plan(precision="bf16", engine="autograd", tasks="loop"),
    ]
    return [pytest.param(p, id=f"{p.precision}-{p.engine}") for p in plans]


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("plan", half_plans())
def test_a_meta_gradient_is_near_that_in_float64(name: str, plan: Plan) -> None:
    algorithm, meta, tasks = PROBLEMS[name]()
    grads, metrics = fmeta.meta_grad(algorithm, plan)(meta, tasks)
    want, exact = fmeta.meta_grad(algorithm, Plan(engine="nested", compile=False))(wide(meta), wide(tasks))
    found = error(grads, want)
    assert 1e-6 < found < TOLERANCE[plan.precision or ""], f"relative error {found:.1e}"
    assert {leaf.dtype for leaf in fmeta.tree.leaves(grads)} == {torch.float32}
    assert metrics["loss"].dtype == torch.float32 and metrics["finite"]
    assert abs(metrics["loss"].item() / exact["loss"].item() - 1) < 1e-2


class Products(TorchDispatchMode):
    """Dtypes of the operations under it, by the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen = self.dtypes.setdefault(func._schema.name.removeprefix("aten::"), set())
        seen |= {x.dtype for x in args if isinstance(x, Tensor) and x.is_floating_point()}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", HALF)
def test_products_are_in_half_precision_and_statistics_are_not(precision: str) -> None:
    algorithm, meta, tasks = pictures()
    gradient = fmeta.meta_grad(algorithm, Plan(precision=precision, compile=False))  # type: ignore[arg-type]
    gradient(meta, tasks)
    with Products() as seen:
        gradient(meta, tasks)
    for name in ("convolution", "convolution_backward"):
        assert seen.dtypes[name] == {DTYPES[precision]}
    for name in ("rsqrt", "mean", "_log_softmax"):
        assert seen.dtypes[name] == {torch.float32}


def test_float64_is_not_lowered() -> None:
    algorithm, meta, tasks = waves()
    got, _ = fmeta.meta_grad(algorithm, Plan(precision="fp16", compile=False))(wide(meta), wide(tasks))
    want, _ = fmeta.meta_grad(algorithm, Plan(compile=False))(wide(meta), wide(tasks))
    assert error(got, want) < 1e-12


def test_a_loss_that_returns_half_precision_is_widened() -> None:
    """A bare scalar, straight from a product."""

    def loss_fn(params: Any, batch: Batch) -> Tensor:
        return params["w"] @ params["w"]

    loop = fmeta.maml(loss_fn, fmeta.sgd(0.1), steps=1).inner_loop  # type: ignore[arg-type]
    weights, batch = {"w": torch.ones(3)}, Batch(torch.ones(2), torch.ones(2))
    assert loss_fn(weights, batch).dtype == torch.float32
    value, _ = lowered(loop, "bf16").loss(weights, weights, batch, torch.zeros((), dtype=torch.int64))
    assert value.dtype == torch.float32
    assert lowered(loop, None) is loop


@pytest.mark.parametrize("size", [1e-5, 1e-6, 1e-7])
def test_small_gradients_survive_float16(size: float) -> None:
    """A loss times ``size``, adapted by a rate over ``size``: without scales every cotangent would be zero."""
    apply, meta = fmeta.functionalize(smooth())
    whole = fmeta.losses.mse(apply)

    def loss_fn(params: Any, batch: Batch) -> Any:
        return size * whole(params, batch)[0], {}

    algorithm = fmeta.maml(loss_fn, fmeta.sgd(0.01 / size), steps=2)
    tasks = SINES(0, 0)
    got, _ = fmeta.meta_grad(algorithm, Plan(precision="fp16", compile=False))(meta, tasks)
    want, _ = fmeta.meta_grad(algorithm, Plan(compile=False))(meta, tasks)
    assert error(got, want) < (5e-3 if size > 1e-6 else 3e-2)


def test_second_derivatives_survive_float16() -> None:
    """A Hessian-vector product is linear in the vector, however small it is."""
    algorithm, meta, tasks = waves()
    k = torch.zeros((), dtype=torch.int64)
    vector = fmeta.tree.map(lambda x: torch.randn(32, *x.shape), meta)
    for tiny in (1.0, 1e-5, 1e-12):
        small = fmeta.tree.scale(vector, tiny)
        traits = Traits(start_reads_support=False, loss_reads_meta=False)
        half = Steps(lowered(algorithm.inner_loop, "fp16"), traits, "error")
        full = Steps(algorithm.inner_loop, traits, "error")
        got, want = (s.pull_gradient(None, small, meta, meta, tasks.support, k)[0] for s in (half, full))
        assert error(got, want) < 5e-3


def test_an_overflow_in_float16_is_reported_and_changes_nothing() -> None:
    algorithm, meta, tasks = waves()
    huge = Task(tasks.support, tasks.query._replace(y=1e4 * tasks.query.y))
    outer = fmeta.adam(1e-3)
    state = fmeta.meta_init(algorithm, outer, meta)
    for precision, finite in (("fp16", False), ("bf16", True)):
        plan = Plan(precision=precision, compile=False)  # type: ignore[arg-type]
        after, metrics = fmeta.meta_step(algorithm, outer, plan)(state, huge)
        assert bool(metrics["finite"]) is finite
        kept = all(torch.equal(after.meta[name], meta[name]) for name in meta)
        assert kept is not finite


@pytest.mark.parametrize("precision", HALF)
def test_training_ends_where_float32_does(precision: str) -> None:
    algorithm, meta, _ = waves(steps=1)
    outer, sampler = fmeta.adam(1e-3), fmeta.tasks.sinusoid(tasks=10, shots=10, queries=10)
    unseen = fmeta.tasks.sinusoid(tasks=100, shots=10, queries=20)(seed=1, step=0)

    def final(plan: Plan) -> float:
        step, state = fmeta.meta_step(algorithm, outer, plan), fmeta.meta_init(algorithm, outer, meta)
        for i in range(200):
            state, _ = step(state, sampler(seed=0, step=i))
        return fmeta.meta_eval(algorithm, Plan(compile=False))(state.meta, unseen)["loss"].mean().item()

    want = final(Plan(compile=False))
    got = final(Plan(precision=precision, compile=False))  # type: ignore[arg-type]
    assert abs(got / want - 1) < 0.02, f"{got} after 200 steps, float32 {want}"


@pytest.mark.parametrize("precision", HALF)
def test_an_evaluation_is_near_that_in_float32(precision: str) -> None:
    algorithm, meta, tasks = pictures()
    plan = Plan(precision=precision)  # type: ignore[arg-type]
    got = fmeta.meta_eval(algorithm, plan, steps=[0, 2])(meta, tasks)["loss"]
    torch.testing.assert_close(
        got, fmeta.meta_eval(algorithm, steps=[0, 2])(meta, tasks)["loss"], rtol=2e-2, atol=0
    )


@pytest.mark.compiles
@pytest.mark.parametrize("precision", HALF)
def test_compiled_is_near_uncompiled(precision: str) -> None:
    """Kernels that inductor fuses round less often."""
    algorithm, meta, tasks = waves(steps=1)
    plans = (Plan(precision=precision, compile=c) for c in (True, False))  # type: ignore[arg-type]
    (got, _), (want, _) = (fmeta.meta_grad(algorithm, plan)(meta, tasks) for plan in plans)
    assert error(got, want) < TOLERANCE[precision]
    assert {leaf.dtype for leaf in fmeta.tree.leaves(got)} == {torch.float32}


def test_inside_a_callers_transform() -> None:
    algorithm, meta, tasks = waves()
    gradient = fmeta.meta_grad(algorithm, Plan(precision="fp16", compile=False))
    two = fmeta.tree.map(lambda x: torch.stack([x, 0.9 * x]), meta)
    both, _ = torch.vmap(gradient, (0, None))(two, tasks)
    alone, _ = gradient(meta, tasks)
    assert error(fmeta.tree.select(both, 0), alone) < TOLERANCE["fp16"]


def test_a_callers_autocast_may_be_on() -> None:
    """Its cache of casts is not ours."""
    algorithm, meta, tasks = waves()
    gradient = fmeta.meta_grad(algorithm, Plan(precision="bf16", compile=False))
    want, _ = gradient(meta, tasks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = gradient(meta, tasks)
    assert error(got, want) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.compiles)])
def test_on_a_gpu(precision: str, compiled: bool) -> None:
    algorithm, meta, tasks = fmeta.tree.map(lambda x: x.cuda() if isinstance(x, Tensor) else x, pictures())
    want, _ = fmeta.meta_grad(algorithm, Plan(compile=False))(meta, tasks)
    got, _ = fmeta.meta_grad(algorithm, Plan(precision=precision, compile=compiled))(meta, tasks)  # type: ignore[arg-type]
    assert error(got, want) < TOLERANCE[precision]


def test_tf32_is_switched_on_for_a_call_alone() -> None:
    """What a loss sees of the switches of a GPU, and what the caller has afterwards; a CPU computes the same."""
    algorithm, meta, tasks = waves()
    switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [switch.allow_tf32 for switch in switches]
    seen: list[bool] = []
    loop = algorithm.inner_loop

    def outer(*args: Any) -> Any:
        seen.extend(switch.allow_tf32 for switch in switches)
        return loop.outer(*args)

    watched = algorithm._replace(inner_loop=loop._replace(outer=outer))
    plan = Plan(precision="tf32", compile=False)
    got, _ = fmeta.meta_grad(watched, plan)(meta, tasks)
    assert seen[-2:] == [True, True]
    assert [switch.allow_tf32 for switch in switches] == before
    assert before[0] is False, "or this shows nothing"
    want, _ = fmeta.meta_grad(algorithm, Plan(compile=False))(meta, tasks)
    assert error(got, want) == 0.0


@pytest.mark.gpu
def test_tf32_is_near_float32_on_a_gpu() -> None:
    algorithm, meta, tasks = fmeta.tree.map(lambda x: x.cuda() if isinstance(x, Tensor) else x, pictures())
    torch.backends.cudnn.allow_tf32 = False
    want, _ = fmeta.meta_grad(algorithm, Plan(compile=False))(meta, tasks)
    got, _ = fmeta.meta_grad(algorithm, Plan(precision="tf32", compile=False))(meta, tasks)
    assert 0 < error(got, want) < TOLERANCE["bf16"]
