"""Bad input gets an error that names the call, what was expected and what came; every message is matched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import case_named
from helpers import assert_trees_close, unstacked
from problems import EAGER, LOSS, classification_tasks, network, regression_tasks, squared_error
from reference import networks
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fmeta
from fmeta import Batch, MetaState, Plan, Task

SGD = fmeta.sgd(0.1)
MAML = fmeta.maml(LOSS, SGD, steps=1)
TASKS = regression_tasks()
ENGINES = (EAGER, Plan(engine="nested", compile=False))
mapped = pytest.mark.parametrize("plan", ENGINES, ids=[plan.engine for plan in ENGINES])


def run(loss: Any, tasks: Any = TASKS, plan: Plan = EAGER, meta: Any = None, steps: int = 1) -> Any:
    algorithm = fmeta.maml(loss, SGD, steps=steps)
    return fmeta.meta_grad(algorithm, plan)(network() if meta is None else meta, tasks)


# Hyperparameters, when an algorithm is made

FACTORIES: dict[str, Callable[..., Any]] = {
    "maml": fmeta.maml,
    "anil": fmeta.anil,
    "reptile": fmeta.reptile,
    "sharpmaml": fmeta.sharpmaml,
    "adapt": lambda loss, inner, **options: fmeta.adapt(loss, network(), TASKS.support, inner, **options),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_factories_check_their_arguments(name: str) -> None:
    make = FACTORIES[name]
    with pytest.raises(ValueError, match=f"{name}: steps must be a non-negative int, got -1. Use steps=0"):
        make(LOSS, SGD, steps=-1)
    with pytest.raises(ValueError, match=f"{name}: steps must be a non-negative int, got 1.5"):
        make(LOSS, SGD, steps=1.5)
    with pytest.raises(ValueError, match=f"{name}: steps must be a non-negative int, got True"):
        make(LOSS, SGD, steps=True)
    with pytest.raises(TypeError, match=f"{name}: loss_fn must be a callable .* got float"):
        make(0.5, SGD, steps=1)
    with pytest.raises(TypeError, match=f"{name}: inner must be a Transform, got float. Use fmeta.sgd"):
        make(LOSS, 0.1, steps=1)


@pytest.mark.parametrize("name", ["maml", "anil", "sharpmaml", "adapt"])
def test_adjoints_are_records(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: adjoint must be an Adjoint, got str. Use fmeta.unroll"):
        FACTORIES[name](LOSS, SGD, steps=1, adjoint="first_order")
    with pytest.raises(TypeError, match=f"{name}: adjoint must be an Adjoint, got function"):
        FACTORIES[name](LOSS, SGD, steps=1, adjoint=fmeta.first_order)


@pytest.mark.parametrize("last", [-1, 1.0, True, None])
def test_truncated_takes_a_count(last: Any) -> None:
    with pytest.raises(ValueError, match=f"truncated: last must be a non-negative int, got {last!r}"):
        fmeta.truncated(last)


@pytest.mark.parametrize("name", ["maml", "anil", "reptile", "sharpmaml"])
def test_batches_is_one_of_two(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: batches must be 'whole' or 'per_step', got 'each'"):
        FACTORIES[name](LOSS, SGD, steps=1, batches="each")


def test_metasgd_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match=r"metasgd: steps must be a non-negative int, got -2"):
        fmeta.metasgd(LOSS, steps=-2)
    with pytest.raises(ValueError, match=r"metasgd: batches must be 'whole' or 'per_step', got None"):
        fmeta.metasgd(LOSS, steps=1, batches=None)  # type: ignore[arg-type]
    for lr in (0.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"metasgd: lr must be a positive float, got"):
            fmeta.metasgd(LOSS, steps=1, lr=lr)
    with pytest.raises(TypeError, match=r"metasgd: lr must be a positive float, got str"):
        fmeta.metasgd(LOSS, steps=1, lr="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", [(1.0,), (0.0, 0.0), (1.0, 1.0, 1.0)])
def test_step_weights_fit_the_steps(weights: tuple[float, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"maml: weights must hold steps \+ 1 = 2 numbers that are not all zero"
    ):
        fmeta.maml(LOSS, SGD, steps=1, weights=weights)


def test_protonet_checks_its_arguments() -> None:
    for loss in (fmeta.losses.mse, fmeta.losses.cross_entropy):
        with pytest.raises(TypeError, match=r"apply must be a callable .* got Linear. Use `apply, params"):
            loss(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"protonet: apply must be a callable .* got int. Use `apply, params"):
        fmeta.protonet(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"protonet: distance must be one of \['cosine', 'euclidean'\]"):
        fmeta.protonet(networks.mlp, distance="manhattan")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"protonet: there is no inner loss, got steps above 0"):
        fmeta.meta_eval(fmeta.protonet(networks.mlp), EAGER, steps=2)(network(), classification_tasks(2))


def test_parameters_that_adapt_must_exist() -> None:
    anil = fmeta.anil(LOSS, SGD, steps=1, adapts="haed")
    with pytest.raises(ValueError, match=r"select: 'haed' matches no parameter.*Did you mean 'head'"):
        fmeta.meta_init(anil, SGD, network())


def test_predictions_need_a_loss_with_a_model() -> None:
    with pytest.raises(ValueError, match=r"predict: the loss must carry its model, got a bare function"):
        MAML.predict(network(), unstacked(TASKS)[0].support, TASKS.query.x[0])


# Plans


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "fast"}, r"Plan: engine must be one of \('adjoint', 'nested', 'autograd'\), got 'fast'"),
        ({"tasks": "pmap"}, r"Plan: tasks must be one of \('vmap', 'loop'\), got 'pmap'"),
        ({"compile": "always"}, r"Plan: compile must be one of \('auto', True, False\), got 'always'"),
        ({"randomness": None}, r"Plan: randomness must be one of .* got None"),
        ({"chunk_size": 0}, "Plan: chunk_size must be a positive int .*got 0"),
        ({"chunk_size": 2.0}, "Plan: chunk_size must be a positive int .*got 2.0"),
        ({"chunk_size": True}, "Plan: chunk_size must be a positive int .*got True"),
        ({"remat": -1}, "Plan: remat must be a positive int or None, got -1"),
        ({"remat": "auto"}, "Plan: remat must be a positive int or None, got 'auto'"),
        ({"engine": "autograd"}, 'engine="autograd" takes tasks one at a time, got tasks="vmap". Set tasks="loop"'),
        ({"engine": "autograd", "tasks": "loop", "compile": True}, 'engine="autograd" is never compiled'),
        ({"engine": "nested", "remat": 2}, "remat belongs to engine=\"adjoint\", got engine='nested'"),
        ({"precision": "int8"}, r"Plan: precision must be one of \(None, 'tf32', 'bf16', 'fp16'\), got 'int8'"),
        ({"precision": "fp16", "engine": "nested"}, 'precision="fp16" needs engine="adjoint".*got engine=\'nested\''),
    ],
    ids=str,
)  # fmt: skip
def test_plans_are_checked_where_they_are_given(options: dict[str, Any], message: str) -> None:
    for make in (fmeta.meta_grad, fmeta.meta_eval):
        with pytest.raises(ValueError, match=message):
            make(MAML, Plan(**options))
    with pytest.raises(ValueError, match=message):
        fmeta.meta_step(MAML, SGD, Plan(**options))


# Arguments of a wrong kind


def test_arguments_of_a_wrong_kind() -> None:
    with pytest.raises(TypeError, match=r"plan: expected an fmeta.Plan, got dict"):
        fmeta.meta_grad(MAML, {"engine": "nested"})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"meta_grad: algorithm must be an Algorithm, got function"):
        fmeta.meta_grad(LOSS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"meta_eval: algorithm must be an Algorithm, got InnerLoop"):
        fmeta.meta_eval(MAML.inner_loop)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"meta_init: algorithm must be an Algorithm, got NoneType"):
        fmeta.meta_init(None, SGD)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"meta_step: outer must be a Transform, got float"):
        fmeta.meta_step(MAML, 0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"meta_init: outer must be a Transform, got Plan"):
        fmeta.meta_init(MAML, Plan(), network())  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"meta_step: state must be a MetaState, got dict. Start with fmeta.meta_init"
    ):
        fmeta.meta_step(MAML, SGD, EAGER)(network(), TASKS)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["maml", "anil", "reptile", "metasgd", "protonet"])
@pytest.mark.parametrize("params", [None, torch.ones(2), {"w": 1.0}], ids=["None", "tensor", "floats"])
def test_weights_are_needed(name: str, params: Any) -> None:
    algorithm = (
        case_named({"maml": "maml 1 step", "protonet": "protonet euclidean"}.get(name, name)).make().algorithm
    )
    with pytest.raises(
        TypeError, match=f"{name}: params must be a dict of tensors, got .* Use `apply, params"
    ):
        fmeta.meta_init(algorithm, SGD, params)


def test_meta_must_be_tensors() -> None:
    for meta in (None, {"w": 1.0}, {"w": None}):
        with pytest.raises(TypeError, match=r"meta_grad: meta must be a tree of tensors, got"):
            fmeta.meta_grad(MAML, EAGER)(meta, TASKS)
    with pytest.raises(TypeError, match=r"meta_step: meta must be a tree of tensors, got float"):
        state = MetaState({"w": 1.0}, (), torch.zeros((), dtype=torch.int64))
        fmeta.meta_step(MAML, SGD, EAGER)(state, TASKS)


@pytest.mark.parametrize("steps", [-1, [], [0, -2], [1.5], "3", True])
def test_steps_of_an_evaluation(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"meta_eval: steps must be non-negative ints, got .* Write steps="):
        fmeta.meta_eval(MAML, EAGER, steps=steps)


# Tasks


def test_every_leaf_has_as_many_tasks() -> None:
    fewer = TASKS._replace(query=Batch(TASKS.query.x[:2], TASKS.query.y[:2]))
    message = r"tasks.support.x has 3 tasks but tasks.query.x has 2 in dim 0"
    with pytest.raises(ValueError, match=f"meta_grad: {message}"):
        run(LOSS, fewer)
    with pytest.raises(ValueError, match=f"meta_eval: {message}"):
        fmeta.meta_eval(MAML, EAGER)(network(), fewer)
    with pytest.raises(ValueError, match=f"meta_step: {message}"):
        fmeta.meta_step(MAML, SGD, EAGER)(fmeta.meta_init(MAML, SGD, network()), fewer)


def test_no_tasks() -> None:
    empty = Task(*(Batch(batch.x[:0], batch.y[:0]) for batch in TASKS))
    with pytest.raises(ValueError, match=r"meta_grad: expected at least one task, got 0"):
        run(LOSS, empty)
    with pytest.raises(ValueError, match=r"meta_grad: tasks hold no tensors"):
        run(LOSS, Task(Batch((), ()), Batch((), ())))
    with pytest.raises(TypeError, match=r"meta_grad: tasks must be a Task .*got list of length 0"):
        run(LOSS, [], Plan(tasks="loop", compile=False))


def test_tasks_of_a_wrong_kind() -> None:
    with pytest.raises(TypeError, match=r"meta_grad: tasks must be a Task of stacked batches, got Batch"):
        run(LOSS, TASKS.support)
    with pytest.raises(TypeError, match=r"meta_grad: tasks must be a Task of stacked batches, got dict"):
        run(LOSS, {"support": TASKS.support, "query": TASKS.query})
    with pytest.raises(TypeError, match=r"meta_grad: tasks.query.y\[0\]\[0\] must be a tensor, got float"):
        run(LOSS, TASKS._replace(query=Batch(TASKS.query.x, [[1.0]] * 3)))
    with pytest.raises(
        ValueError, match=r"meta_grad: tasks.support.y must have a leading task axis, got a scalar"
    ):
        run(LOSS, TASKS._replace(support=Batch(TASKS.support.x, torch.tensor(1.0))))
    with pytest.raises(ValueError, match=r"meta_grad: a sequence of 1 tasks needs one shape or a loop"):
        run(LOSS, [unstacked(TASKS)[0]])


def test_tasks_without_a_task_axis() -> None:
    loss, tasks = fmeta.losses.cross_entropy(networks.mlp), classification_tasks(2)
    first = Batch(tasks.support.x[0], tasks.support.y[0])
    with pytest.raises(
        ValueError, match=r"meta_grad: the loss failed \(.*\) on a task in which support.y is a sing"
    ):
        run(loss, Task(first, first))


def test_examples_without_labels() -> None:
    loss, tasks = fmeta.losses.cross_entropy(networks.mlp), classification_tasks(2)
    fewer = tasks._replace(support=tasks.support._replace(y=tasks.support.y[:, :3]))
    message = (
        r"meta_grad: the loss failed \(.*\) on a task whose support.x has 4 examples but support.y has 3"
    )
    with pytest.raises(ValueError, match=message):
        run(loss, fewer)
    one_label = lambda p, b: F.cross_entropy(networks.mlp(p, b.x).mean(0)[None], b.y)  # noqa: E731
    run(one_label, Task(*(batch._replace(y=batch.y[:, :1]) for batch in tasks)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_tasks_of_another_type_than_the_model(dtype: torch.dtype) -> None:
    loss, tasks = fmeta.losses.cross_entropy(networks.mlp), classification_tasks(2)
    own = str(tasks.support.x.dtype).removeprefix("torch.")
    other = fmeta.tree.map(lambda x: x.to(dtype) if x.is_floating_point() else x, tasks)
    said = rf"meta_grad: the loss failed \(.*\) on a task in which support.x is {str(dtype)[6:]}, where meta is {own}"
    with pytest.raises(ValueError, match=said):
        run(loss, other)
    cast = lambda b: b._replace(x=b.x.to(tasks.support.x.dtype))  # noqa: E731
    broken = lambda p, b: loss(p, cast(b))[0] + torch.zeros(2) @ torch.zeros(3)  # noqa: E731
    with pytest.raises(RuntimeError, match=r"^inconsistent tensor size"):
        run(broken, other)


def test_batches_for_each_step_have_a_dimension_more() -> None:
    algorithm = fmeta.maml(LOSS, SGD, steps=2, batches="per_step")
    message = r"meta_eval: batches='per_step' takes support leaves .* got support.x of shape \(3, 4, 2\)"
    with pytest.raises(ValueError, match=message):
        fmeta.meta_eval(algorithm, EAGER)(network(), TASKS)


def test_nothing_to_learn() -> None:
    apply, params = fmeta.functionalize(torch.nn.Linear(2, 3).double().requires_grad_(False))
    algorithm = fmeta.maml(fmeta.losses.mse(apply), SGD, steps=1)
    state = fmeta.meta_init(algorithm, SGD, params)
    with pytest.raises(
        ValueError, match=r"meta_grad: meta holds no floating tensor, so nothing is meta-learned"
    ):
        fmeta.meta_grad(algorithm)(params, TASKS)
    with pytest.raises(ValueError, match=r"meta_step: meta holds no floating tensor"):
        fmeta.meta_step(algorithm, SGD)(state, TASKS)
    assert fmeta.meta_eval(algorithm, EAGER)(params, TASKS)["loss"].shape == (3,)


# Losses


@mapped
def test_a_loss_is_one_floating_number(plan: Plan) -> None:
    per_example = lambda p, b: (((networks.mlp(p, b.x) - b.y) ** 2).mean(1), {})  # noqa: E731
    with pytest.raises(ValueError, match=r"meta_grad: the loss must be a floating scalar, got shape \(5,\)"):
        run(per_example, plan=plan)
    count = lambda p, b: ((networks.mlp(p, b.x) > b.y).sum(), {})  # noqa: E731
    with pytest.raises(ValueError, match=r"must be a floating scalar, got shape \(\) of torch.int64"):
        run(count, plan=plan)
    with pytest.raises(TypeError, match=r"must return \(scalar, metrics\), got a float"):
        run(lambda p, b: 1.0, plan=plan)
    for nothing in (None, (None, {})):
        with pytest.raises(TypeError, match=r"the loss must return \(scalar, metrics\), got None"):
            run(lambda p, b, nothing=nothing: nothing, plan=plan)
    with pytest.raises(TypeError, match=r"must return \(scalar, metrics\), got a list"):
        run(lambda p, b: (squared_error(p, tuple(b)), []), plan=plan)
    with pytest.raises(TypeError, match=r"must return \(scalar, metrics\), got a tuple of 3"):
        run(lambda p, b: (squared_error(p, tuple(b)), {}, {}), plan=plan)
    vector = lambda p, b: (squared_error(p, tuple(b)), {"all": torch.ones(2)})  # noqa: E731
    with pytest.raises(
        ValueError, match=r"metric 'all' must be a tensor without dimensions, got a tensor of shape"
    ):
        run(vector, plan=plan)
    number = lambda p, b: (squared_error(p, tuple(b)), {"half": 0.5})  # noqa: E731
    with pytest.raises(ValueError, match=r"metric 'half' must be a tensor without dimensions, got a float"):
        run(number, plan=plan)


def per_target(params: dict[str, Tensor], batch: Batch) -> Tensor:
    return (networks.mlp(params, batch.x) - batch.y).square().mean(0)


def test_errors_name_the_loss_and_the_call() -> None:
    maml = lambda **losses: fmeta.maml(inner=SGD, steps=1, **losses)  # noqa: E731
    state = fmeta.meta_init(MAML, SGD, network())
    for algorithm, what in (
        (maml(loss_fn=per_target), "the loss"),
        (maml(loss_fn=LOSS, query_loss=per_target), "the query loss"),
        (maml(loss_fn=per_target, query_loss=LOSS), "the support loss"),
    ):
        message = rf"{what} must be a floating scalar, got shape \(3,\)"
        with pytest.raises(ValueError, match=f"meta_grad: {message}"):
            fmeta.meta_grad(algorithm, EAGER)(network(), TASKS)
        with pytest.raises(ValueError, match=f"meta_step: {message}"):
            fmeta.meta_step(algorithm, SGD, EAGER)(state, TASKS)
        with pytest.raises(ValueError, match=f"meta_eval: {message}"):
            fmeta.meta_eval(algorithm, EAGER)(network(), TASKS)
    with pytest.raises(ValueError, match=r"adapt: the loss must be a floating scalar, got shape \(3,\)"):
        fmeta.adapt(per_target, network(), unstacked(TASKS)[0].support, SGD, steps=1)
    reptile = fmeta.reptile(LOSS, SGD, steps=1, query_loss=lambda params, batch: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match=r"reptile: the query loss must return \(scalar, metrics\), got None"):
        fmeta.meta_grad(reptile, EAGER)(network(), TASKS)


@pytest.mark.parametrize("name", ["maml", "anil", "reptile", "metasgd"])
def test_metrics_do_not_hide_those_of_fmeta(name: str) -> None:
    def loss(params: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        value = squared_error(params, tuple(batch))
        return value, {metric: value}

    make: Any = {**FACTORIES, "metasgd": lambda loss, inner, steps: fmeta.metasgd(loss, steps=steps)}[name]
    algorithm = make(loss, SGD, steps=1)
    meta = fmeta.meta_init(algorithm, SGD, network()).meta
    for metric, call in (("loss", name), ("finite", "meta_grad"), ("first_bad", "meta_grad")):
        with pytest.raises(ValueError, match=f"{call}: a metric must not be named '{metric}', got one"):
            fmeta.meta_grad(algorithm, EAGER)(meta, TASKS)


def test_a_bare_scalar_is_a_loss_without_metrics() -> None:
    got, metrics = run(lambda p, b: squared_error(p, tuple(b)))
    assert_trees_close(got, run(LOSS)[0], 1e-12)
    assert sorted(metrics) == ["finite", "first_bad", "loss"]


def reads_a_value(params: dict[str, Tensor], batch: Batch) -> Tensor:
    return squared_error(params, tuple(batch)) * (1.0 + 0 * batch.x.mean().item())


def branches_on_a_value(params: dict[str, Tensor], batch: Batch) -> Tensor:
    loss = squared_error(params, tuple(batch))
    return loss if loss > 0 else -loss


@mapped
@pytest.mark.parametrize("loss", [reads_a_value, branches_on_a_value])
def test_losses_that_read_values(loss: Any, plan: Plan) -> None:
    message = r'reads the value of a tensor .*cannot be batched.* Plan\(engine="autograd", tasks="loop"\)'
    with pytest.raises(ValueError, match=f"meta_grad: the loss {message}"):
        run(loss, plan=plan)


def takes_a_list(params: dict[str, Tensor], batch: Batch) -> Tensor:
    return squared_error(params, tuple(batch)) * (1.0 + 0 * batch.x.tolist()[0][0])


def takes_an_array(params: dict[str, Tensor], batch: Batch) -> Tensor:
    return squared_error(params, tuple(batch)) * (1.0 + 0 * float(batch.x.numpy().mean()))


@mapped
@pytest.mark.parametrize("loss", [takes_a_list, takes_an_array])
def test_losses_that_leave_torch(loss: Any, plan: Plan) -> None:
    message = r'the loss reads the value of a tensor, which cannot be batched .*Plan\(engine="autograd"'
    with pytest.raises(ValueError, match=f"meta_grad: {message}"):
        run(loss, plan=plan)
    assert_trees_close(run(loss, plan=Plan(engine="autograd", tasks="loop"))[0], run(LOSS)[0], 1e-10)


@mapped
def test_losses_that_index_by_a_mask(plan: Plan) -> None:
    def masked(params: dict[str, Tensor], batch: Batch) -> Tensor:
        return (networks.mlp(params, batch.x) - batch.y)[batch.x[:, 0] > 0].square().sum()

    message = r'meta_grad: .* shape depends on values .* Use torch.where, or Plan\(engine="autograd", tasks="loop"\)'
    with pytest.raises(ValueError, match=message):
        run(masked, plan=plan)
    run(masked, plan=Plan(engine="autograd", tasks="loop"))


@pytest.mark.parametrize("loss", [reads_a_value, branches_on_a_value])
def test_what_the_message_advises_works(loss: Any) -> None:
    got, _ = run(loss, plan=Plan(engine="autograd", tasks="loop"))
    assert_trees_close(got, run(LOSS)[0], 1e-10)


@mapped
def test_one_hot_is_no_read_of_values(plan: Plan) -> None:
    """torch looks at the labels when it is called eagerly, and not under vmap."""

    def one_hot_error(params: dict[str, Tensor], batch: Batch) -> Tensor:
        return (networks.mlp(params, batch.x) - F.one_hot(batch.y, 3)).square().mean()

    def eye_error(params: dict[str, Tensor], batch: Batch) -> Tensor:
        return (networks.mlp(params, batch.x) - torch.eye(3)[batch.y]).square().mean()

    tasks = classification_tasks(2)
    assert_trees_close(run(one_hot_error, tasks, plan)[0], run(eye_error, tasks, plan)[0], 1e-12)


@mapped
def test_losses_that_change_their_inputs(plan: Plan) -> None:
    def in_place(params: dict[str, Tensor], batch: Batch) -> Tensor:
        batch.x.mul_(2.0)
        return squared_error(params, tuple(batch))

    tasks = Task(*(Batch(batch.x.clone(), batch.y.clone()) for batch in TASKS))
    with pytest.raises(ValueError, match=r"meta_grad: a loss must not change its inputs, got an in-place"):
        run(in_place, tasks, plan)


@mapped
def test_losses_that_write_to_a_captured_tensor(plan: Plan) -> None:
    seen = torch.zeros((), dtype=torch.float64)

    def counts(params: dict[str, Tensor], batch: Batch) -> Tensor:
        seen.add_(batch.x.mean())
        return squared_error(params, tuple(batch))

    with pytest.raises(ValueError, match=r"meta_grad: the loss writes to a captured tensor in place"):
        run(counts, plan=plan)


@mapped
def test_checkpoints_inside_a_loss(plan: Plan) -> None:
    def checkpointed(params: dict[str, Tensor], batch: Batch) -> Tensor:
        return checkpoint(lambda p: squared_error(p, tuple(batch)), params, use_reentrant=False)

    with pytest.raises(
        ValueError, match=r"meta_grad: the loss uses torch.utils.checkpoint, which torch.func refuses"
    ):
        run(checkpointed, plan=plan)


class Double(torch.autograd.Function):
    """An operation in the old form, which torch.func does not take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * grad


def doubled(params: dict[str, Tensor], batch: Batch) -> Tensor:
    return 0.5 * Double.apply(squared_error(params, tuple(batch)))


@mapped
def test_operations_that_torch_func_refuses(plan: Plan) -> None:
    message = r'meta_grad: the loss uses an operation .* refuses. Use Plan\(engine="autograd", tasks="loop"\)'
    with pytest.raises(ValueError, match=message):
        run(doubled, plan=plan)
    got, _ = run(doubled, plan=Plan(engine="autograd", tasks="loop"))
    assert_trees_close(got, run(LOSS)[0], 1e-10)


@mapped
def test_native_norms_of_a_loss_are_rewritten_or_refused(plan: Plan) -> None:
    """Their second derivative is silently wrong under vmap: never a wrong number."""

    def functional(params: dict[str, Tensor], batch: Batch) -> Tensor:
        hidden = F.layer_norm(batch.x @ params["w"], (3,), params["scale"])
        return (torch.tanh(hidden) - batch.y).square().mean()

    def native(params: dict[str, Tensor], batch: Batch) -> Tensor:
        hidden = torch.ops.aten.native_layer_norm(batch.x @ params["w"], [3], params["scale"], None, 1e-5)[0]
        return (torch.tanh(hidden) - batch.y).square().mean()

    meta = {"w": torch.eye(2, 3, dtype=torch.float64), "scale": torch.ones(3, dtype=torch.float64)}
    got, _ = run(functional, plan=plan, meta=meta)
    want, _ = run(functional, plan=Plan(engine="autograd", tasks="loop"), meta=meta)
    assert_trees_close(got, want, 1e-10)
    with pytest.raises(
        NotImplementedError, match=r"the loss calls torch.ops.aten.native_layer_norm, whose second"
    ):
        run(native, plan=plan, meta=meta)


def test_labels_of_a_loss() -> None:
    loss = fmeta.losses.cross_entropy(networks.mlp)
    tasks = classification_tasks(2)
    with pytest.raises(TypeError, match=r"cross_entropy: labels must be integers, got torch.float64"):
        run(loss, Task(*(batch._replace(y=batch.y.double()) for batch in tasks)))
    for label in (3, -1):
        wrong = tasks.query.y.clone()
        wrong[2, 0] = label
        with pytest.raises(
            ValueError, match=f"cross_entropy: labels must be in 0..2 for 3 outputs, got {label}"
        ):
            run(loss, tasks._replace(query=tasks.query._replace(y=wrong)))

    boolean = Task(*(batch._replace(y=batch.y > 0) for batch in tasks))
    with pytest.raises(TypeError, match=r"cross_entropy: labels must be integers, got torch.bool"):
        run(loss, boolean)


@pytest.mark.parametrize(
    "plan", [EAGER, Plan(tasks="loop", compile=False), Plan(engine="autograd", tasks="loop")], ids=str
)
def test_labels_of_later_calls(plan: Plan) -> None:
    loss, tasks = fmeta.losses.cross_entropy(networks.mlp), classification_tasks(2)
    function = fmeta.meta_grad(fmeta.maml(loss, SGD, steps=1), plan)
    function(network(), tasks)
    wrong = Task(*(batch._replace(y=batch.y + 7) for batch in tasks))
    with pytest.raises(
        ValueError, match=r"meta_grad: .* index .* out of bounds. Labels must be in 0..ways-1"
    ):
        function(network(), wrong)


@pytest.mark.compiles
def test_labels_of_later_calls_of_kernels() -> None:
    loss, tasks = fmeta.losses.cross_entropy(networks.mlp), classification_tasks(2)
    function = fmeta.meta_grad(fmeta.maml(loss, SGD, steps=1))
    wrong = Task(*(batch._replace(y=batch.y + 7) for batch in tasks))
    for _ in range(3):  # the kernels are built, recorded and replayed
        function(network(), tasks)
        with pytest.raises(ValueError, match=r"Labels must be in 0..ways-1|labels must be in 0..2"):
            function(network(), wrong)


def test_labels_of_prototypes() -> None:
    protonet, tasks = fmeta.protonet(networks.mlp), classification_tasks(2)
    run = fmeta.meta_grad(protonet, EAGER)
    as_floats = Task(*(batch._replace(y=batch.y.double()) for batch in tasks))
    with pytest.raises(TypeError, match=r"protonet: labels must be integers, got torch.float64"):
        run(network(), as_floats)
    high = tasks._replace(query=tasks.query._replace(y=tasks.query.y + 5))
    with pytest.raises(ValueError, match=r"protonet: labels must be in 0..3 for 4 outputs, got 7"):
        run(network(), high)
    two = tasks._replace(support=tasks.support._replace(y=tasks.support.y.clamp(max=1)))
    with pytest.raises(ValueError, match=r"protonet: every class of the query set .* got none of class 2"):
        run(network(), two)
    small = Task(*(batch._replace(y=batch.y.int()) for batch in tasks))
    assert_trees_close(run(network(), small)[0], run(network(), tasks)[0], 1e-12)


class MineError(Exception):
    """The user's own."""


@mapped
def test_the_users_own_errors_pass_and_leave_nothing_behind(plan: Plan) -> None:
    calls: list[None] = []

    def fails_later(params: dict[str, Tensor], batch: Batch) -> Tensor:
        calls.append(None)
        if len(calls) > 8:
            raise MineError("mine")
        return squared_error(params, tuple(batch))

    with pytest.raises(MineError, match=r"mine"):
        run(fails_later, plan=plan, steps=9)
    assert_trees_close(run(LOSS, plan=plan)[0], run(LOSS)[0], 1e-12)
