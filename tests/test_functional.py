"""Modules as pure functions: what apply and params are, policies of batch norm, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_trees_close, assert_trees_equal
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_sequence

from fmeta.functional import differentiable, functionalize
from fmeta.types import Params

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")


class Everything(nn.Module):
    """Frozen, tied and unused parameters, buffers, dropout, a keyword argument and a second output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4, bias=False)
        self.fixed = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(4, 4, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("shift", torch.randn(4))

    def forward(self, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        hidden = self.drop(self.norm(self.fixed(self.embed(x))) + self.shift)
        return self.out(torch.tanh(hidden)) * scale, hidden


def test_apply_is_the_module() -> None:
    module, x = Everything().eval(), torch.randn(5, 4)
    apply, params = functionalize(module)
    assert_trees_equal(apply(params, x, scale=2.0), module(x, scale=2.0))
    doubled = {name: 2 * p for name, p in params.items()}
    assert_trees_equal(apply(doubled, x), functional_call(module, doubled, (x,)))


def test_params_are_the_trainable_ones_in_order() -> None:
    module = Everything()
    _, params = functionalize(module)
    want = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert list(params) == list(want) and "out.weight" not in params and "fixed.weight" not in params
    assert_trees_equal(params, {name: p.detach() for name, p in want.items()})
    for name, p in params.items():
        assert not p.requires_grad and type(p) is Tensor
        assert p.untyped_storage().data_ptr() != want[name].untyped_storage().data_ptr()


def test_tied_parameters_get_both_gradients_and_unused_ones_none() -> None:
    module, x = Everything().eval(), torch.randn(5, 4)
    apply, params = functionalize(module)
    got = grad(lambda p: apply(p, x)[0].square().mean())(params)
    module(x)[0].square().mean().backward()
    want = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters() if n in got
    }
    assert_trees_close(got, want)
    assert got["unused.weight"].abs().max() == 0


def test_the_module_is_never_touched() -> None:
    module, x = Everything(), torch.randn(5, 4)
    before, kinds = copy.deepcopy(module.state_dict()), [type(child) for child in module.modules()]
    apply, params = functionalize(module)
    vmap(grad(lambda p, x: apply(p, x)[0].mean()), (None, 0), randomness="same")(params, torch.randn(3, 5, 4))
    apply(params, x)
    assert_trees_equal(module.state_dict(), before)
    assert [type(child) for child in module.modules()] == kinds
    assert apply.module is not module and apply.module.state_dict().keys() == before.keys()


def test_inputs_are_not_changed() -> None:
    apply, params = functionalize(Everything().eval())
    keep, x = dict(params), torch.randn(5, 4)
    copies, x_copy = {n: p.clone() for n, p in params.items()}, x.clone()
    apply(params, x)
    assert params == keep, "another tensor in the dict of params"
    assert_trees_equal((params, x), (copies, x_copy))


def test_train_and_eval_are_those_of_the_moment() -> None:
    module, x = Everything(), torch.ones(64, 4) * torch.arange(64)[:, None]
    train, params = functionalize(module)
    evaluate, _ = functionalize(module.eval())
    assert (train(params, x)[1] == 0).any(), "dropout is on"
    assert_trees_equal(evaluate(params, x), module(x))
    module.train()
    assert_trees_equal(evaluate(params, x), evaluate(params, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype(dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)
    apply, params = functionalize(module)
    x = torch.randn(5, 4, dtype=dtype)
    out = apply(params, x)
    assert out.dtype == dtype and all(p.dtype == dtype for p in params.values())
    torch.testing.assert_close(out, module(x), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_any_device() -> None:
    module = Everything().eval().cuda()
    apply, params = functionalize(module)
    x = torch.randn(5, 4, device="cuda")
    assert_trees_close(apply(params, x), module(x))


def test_a_module_without_parameters() -> None:
    apply, params = functionalize(nn.ReLU())
    assert params == {}
    assert apply({}, torch.tensor([-1.0, 1.0])).tolist() == [0.0, 1.0]


def test_constants_can_be_replaced_for_a_call() -> None:
    module, x = Everything().eval(), torch.randn(5, 4)
    apply, params = functionalize(module)
    changed = {**params, "shift": torch.zeros(4), "fixed.bias": torch.ones(4)}
    assert_trees_equal(apply(changed, x), functional_call(module, changed, (x,)))
    assert_trees_equal(apply(params, x), module(x))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda p: {k: v for k, v in p.items() if k != "embed.weight"}, r"but \['embed.weight'\] is missing"),
        (lambda p: {**p, "head": p["embed.weight"]}, r"nothing is missing and \['head'\] is unknown"),
    ],
)
def test_params_must_be_complete(change: Callable[[Params], Params], text: str) -> None:
    apply, params = functionalize(Everything().eval())
    with pytest.raises(ValueError, match=text):
        apply(change(params), torch.randn(5, 4))


# Batch norm ----------------------------------------------------------------------------------------------


def trained_norm() -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(4)
    for _ in range(3):
        norm(3 + 2 * torch.randn(20, 4))
    return norm


@pytest.mark.parametrize(
    ("policy", "training", "frozen"),
    [(None, True, False), (None, False, True), ("batch", True, False), ("batch", False, False),
     ("frozen", True, True), ("frozen", False, True)],
)  # fmt: skip
def test_policies_of_batch_norm(policy: Any, training: bool, frozen: bool) -> None:
    norm, x = trained_norm(), torch.randn(6, 4)
    apply, params = functionalize(nn.Sequential(norm.train(training)), batch_norm=policy)
    statistics = (norm.running_mean, norm.running_var) if frozen else (None, None)
    want = F.batch_norm(x, *statistics, norm.weight, norm.bias, training=not frozen)
    torch.testing.assert_close(apply(params, x), want.detach(), rtol=1e-5, atol=1e-6)
    assert_trees_equal(dict(apply.module[0].named_buffers()), dict(norm.named_buffers()))  # type: ignore[index]


def test_batch_norm_without_running_statistics_uses_the_batch_in_an_evaluation_too() -> None:
    norm, x = nn.BatchNorm1d(4, track_running_stats=False).eval(), torch.randn(6, 4)
    apply, params = functionalize(norm)
    torch.testing.assert_close(apply(params, x), norm(x), rtol=1e-5, atol=1e-6)


def test_instance_norm_with_running_statistics_follows_its_mode() -> None:
    norm, x = nn.InstanceNorm1d(4, affine=True, track_running_stats=True), torch.randn(3, 4, 6)
    norm(5 + x)
    apply, params = functionalize(norm)
    torch.testing.assert_close(apply(params, x), F.instance_norm(x), rtol=1e-5, atol=1e-5)
    apply, params = functionalize(norm.eval())
    torch.testing.assert_close(apply(params, x), norm(x), rtol=1e-5, atol=1e-6)


def test_a_layer_that_serves_twice_is_one_layer() -> None:
    norm = nn.BatchNorm1d(4)
    apply, params = functionalize(nn.Sequential(norm, nn.Tanh(), norm))
    x = torch.randn(6, 4)
    want = nn.Sequential(norm, nn.Tanh(), norm)(x)
    torch.testing.assert_close(apply(params, x), want.detach(), rtol=1e-5, atol=1e-6)
    assert list(params) == ["0.weight", "0.bias"]


class OwnForward(nn.BatchNorm1d):
    """A subclass as libraries write them (norm and activation in one)."""

    def forward(self, x: Tensor) -> Tensor:
        training = self.training or self.running_mean is None
        return F.relu(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training))


class NoForward(nn.BatchNorm1d):
    pass


def test_subclasses_of_batch_norm() -> None:
    x = torch.randn(6, 4)
    apply, params = functionalize(NoForward(4))
    torch.testing.assert_close(
        apply(params, x), F.batch_norm(x, None, None, training=True), rtol=1e-5, atol=1e-6
    )
    apply, params = functionalize(OwnForward(4).eval())
    torch.testing.assert_close(apply(params, x), OwnForward(4).eval()(x).detach())
    apply, params = functionalize(OwnForward(4, track_running_stats=False))
    torch.testing.assert_close(
        apply(params, x), F.batch_norm(x, None, None, training=True).relu(), rtol=1e-5, atol=1e-6
    )
    apply, params = functionalize(OwnForward(4))
    with pytest.raises(ValueError, match="batch_norm: running statistics would be updated in place"):
        apply(params, x)


def test_a_subclass_of_layer_norm_with_its_own_forward_is_right() -> None:
    """torchvision's LayerNorm2d calls the function on a permuted tensor."""
    from torchvision.models.convnext import LayerNorm2d
    from torchvision.ops.misc import Permute

    net = nn.Sequential(
        nn.Conv2d(2, 3, 1), LayerNorm2d(3), nn.Tanh(), Permute([0, 2, 3, 1]), nn.Linear(3, 1)
    ).double()
    assert_nested_equals_loop(net, torch.randn(2, 4, 2, 3, 3, dtype=torch.float64))


# Nestings and compilers ----------------------------------------------------------------------------------


def meta_gradient(loss: Callable[[Params, Tensor], Tensor], x: Tensor) -> Callable[[Params], Params]:
    """Gradient of the mean loss of tasks ``x`` after one gradient step on each."""

    def adapted(params: Params, x: Tensor) -> Tensor:
        grads = grad(loss)(params, x)
        return loss({name: params[name] - 0.3 * grads[name] for name in params}, x)

    return grad(lambda params: vmap(adapted, (None, 0))(params, x).mean())


def loop_gradient(net: nn.Module, params: Params, x: Tensor) -> Params:
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    total = torch.zeros((), dtype=x.dtype)
    for task in x:
        loss = lambda p, task=task: functional_call(net, p, (task,)).sin().mean()  # noqa: E731
        grads = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True)
        total = total + loss({n: p - 0.3 * g for (n, p), g in zip(leaves.items(), grads, strict=True)}) / len(
            x
        )
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def assert_nested_equals_loop(net: nn.Module, x: Tensor) -> None:
    apply, params = functionalize(net)
    got = meta_gradient(lambda p, x: apply(p, x).sin().mean(), x)(params)
    assert_trees_close(got, loop_gradient(net, params, x), 1e-10)


NETS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2)),
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(8, 2)),
    "encoder, evaluation": lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).eval(),
    "gru": lambda: First(nn.GRU(6, 4)),
}


class First(nn.Module):
    """The first output of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


@pytest.mark.parametrize("name", NETS)
def test_traced_and_compiled_gradients_are_right(name: str) -> None:
    net = NETS[name]().double()
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    apply, params = functionalize(net)
    gradient = meta_gradient(lambda p, x: apply(p, x).sin().mean(), x)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = loop_gradient(net, params, x)
    assert_trees_close(gradient(params), want, 1e-10)
    graph = make_fx(gradient, tracing_mode="real")(params)
    assert_trees_close(graph(params), want, 1e-10)
    assert not [n for n in graph.graph.nodes if "native_" in str(n.target) or "batch_norm" in str(n.target)]
    torch.compiler.reset()
    assert_trees_close(torch.compile(gradient, fullgraph=True, backend="aot_eager")(params), want, 1e-10)


@pytest.mark.parametrize("first", ["eager", "compiled"])
def test_one_apply_serves_eagerly_and_compiled(first: str) -> None:
    apply, params = functionalize(NETS["batch norm"]())
    x = torch.randn(4, 5, 6)
    torch.compiler.reset()
    compiled = torch.compile(apply, fullgraph=True, backend="eager")
    calls = [apply, compiled] if first == "eager" else [compiled, apply]
    assert_trees_close(calls[0](params, x), calls[1](params, x))
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(params, x + 1)


def hand_written(params: Params, x: Tensor) -> Tensor:
    hidden = F.layer_norm(x @ params["w"], (5,), params["scale"], params["shift"])
    return F.scaled_dot_product_attention(hidden, hidden, hidden).sin().mean()


def test_the_context_makes_a_hand_written_loss_right() -> None:
    params = {"w": torch.randn(4, 5), "scale": torch.rand(5) + 0.5, "shift": torch.randn(5)}
    params = {name: p.double() for name, p in params.items()}
    x = torch.randn(3, 2, 6, 4, dtype=torch.float64)

    def loss(params: Params, x: Tensor) -> Tensor:
        with differentiable():
            return hand_written(params, x)

    v, h = {name: torch.randn_like(p) for name, p in params.items()}, 1e-6
    gradient = meta_gradient(loss, x)
    _, slope = jvp(gradient, (params,), (v,))
    up, down = (gradient({n: params[n] + s * h * v[n] for n in v}) for s in (1, -1))
    assert_trees_close(slope, {n: (up[n] - down[n]) / (2 * h) for n in v}, 1e-6)
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")(params)
    assert_trees_close(compiled, gradient(params), 1e-10)


def test_the_context_is_entered_once_and_left() -> None:
    assert torch._C._len_torch_function_stack() == 0
    with differentiable(), differentiable():
        assert torch._C._len_torch_function_stack() == 1
    with pytest.raises(ZeroDivisionError), differentiable():
        raise ZeroDivisionError
    assert torch._C._len_torch_function_stack() == 0


def test_no_fast_path_in_an_evaluation_with_padding() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    net = nn.TransformerEncoder(layer, 2).eval()
    apply, params = functionalize(net)
    x, padding = torch.randn(3, 4, 5, 8), torch.arange(5).expand(3, 4, 5) > 2
    run = lambda x, padding: vmap(lambda x, m: apply(params, x, src_key_padding_mask=m))(x, padding)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    slow = torch.stack([net.train()(x[i], src_key_padding_mask=padding[i]) for i in range(3)])
    with torch.no_grad():  # where torch would take the fast path
        torch.testing.assert_close(run(x, padding), slow, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled(x, padding), slow, rtol=1e-4, atol=1e-5)


# What is refused -----------------------------------------------------------------------------------------


class Counter(nn.Module):
    """A forward that leaves something behind, in the way that ``change`` says."""

    def __init__(self, change: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("mean", torch.zeros(3))
        self.scale = torch.ones(3)
        self.calls = 0
        self.history: list[Tensor] = []
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        self.change(self, x)
        return self.linear(x)


def assign(name: str, value: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    return lambda self, x: setattr(self, name, value(self, x))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda self, x: self.mean.mul_(0.9), "mean"),
        (lambda self, x: self.scale.add_(1), "scale"),
        (assign("mean", lambda self, x: self.mean + 1), "mean"),
        (assign("scale", lambda self, x: x.detach()), "scale"),
        (assign("calls", lambda self, x: self.calls + 1), "calls"),
        (assign("new", lambda self, x: x), "new"),
        (lambda self, x: self.history.append(x), "history"),
        (lambda self, x: delattr(self, "scale"), "scale"),
        (assign("linear", lambda self, x: nn.Linear(3, 3)), "linear.weight"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_forward_that_changes_the_module_is_refused(change: Any, name: str, nested: bool) -> None:
    net = nn.Sequential(Counter(change)) if nested else Counter(change)
    apply, params = functionalize(net)
    where = f"0.{name}" if nested else name
    for _ in range(2):  # an error does not make it acceptable
        with pytest.raises(
            ValueError, match=f"forward must not change the module, but it changed.*'{where}'"
        ):
            apply(params, torch.randn(2, 3))
        apply, params = functionalize(net)


def test_a_change_inside_a_transform_is_refused_by_the_place() -> None:
    net = nn.Sequential(nn.Linear(3, 3), Counter(lambda self, x: self.mean.add_(x.mean(0))))
    apply, params = functionalize(net)
    with pytest.raises(ValueError, match=r"forward of Counter at '1' writes in place"):
        vmap(lambda x: apply(params, x))(torch.randn(4, 2, 3))
    with pytest.raises(ValueError, match=r"forward of Counter at '1' writes in place"):
        grad(lambda p: apply(p, torch.randn(2, 3)).mean())(params)


def test_another_error_of_forward_stays_what_it_is() -> None:
    apply, params = functionalize(nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        apply(params, torch.randn(2, 4))


def test_the_check_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    monkeypatch.setattr("fmeta.functional.purity.refuse_changes", lambda before, after: looks.append(1))
    apply, params = functionalize(nn.Linear(3, 3))
    for _ in range(3):
        apply(params, torch.randn(2, 3))
    assert looks == [1]


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.weights = [self.linear.weight]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weights[0]


class Keeps(nn.Module):
    """A layer, and something else that refers to modules: ``keep(self)``."""

    def __init__(self, keep: Callable[[Any], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.kept = keep(self)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.kept[0] if isinstance(self.kept, list) and self.kept else self.kept
        return kept(x) if callable(kept) else self.layer(x)


def closure(value: Any) -> Callable[[], Any]:
    return lambda: value


ASIDE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "list": (
        lambda net: [nn.Linear(3, 3)],
        "keeps a Linear in the attribute 'kept', where it is not registered",
    ),
    "dict": (lambda net: {"a": (nn.Linear(3, 3),)}, "Use nn.ModuleList or nn.ModuleDict"),
    "partial": (lambda net: partial(nn.Linear(3, 3)), "keeps a Linear in the attribute 'kept', where"),
    "method": (lambda net: nn.Linear(3, 3).forward, "keeps a Linear in the attribute 'kept', where"),
    "self in a closure": (
        closure,
        "a function in the attribute 'kept' that refers to a Keeps, whose parameters",
    ),
    "part in a closure": (
        lambda net: closure(net.layer),
        "refers to a Linear, whose.*Make it a method, or pass",
    ),
    "method in a closure": (lambda net: closure(net.layer.forward), "refers to a Linear, whose parameters"),
    "default": (lambda net: lambda x, layer=net.layer: layer(x), "refers to a Linear, whose parameters"),
    "closure in a partial": (lambda net: [partial(closure(net))], "refers to a Keeps, whose parameters"),
    "parameter in a partial": (lambda net: partial(F.linear, weight=net.layer.weight), "keeps parameters in"),
    "parameter in a closure": (
        lambda net: closure(net.layer.weight),
        "keeps parameters in the attribute 'kept'",
    ),
}


@pytest.mark.parametrize(("keep", "text"), ASIDE.values(), ids=ASIDE)
def test_what_params_would_not_reach_is_refused(keep: Callable[[Any], Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"functionalize: Keeps at 'the top' .*{text}"):
        functionalize(Keeps(keep))


REACHED: dict[str, Callable[[Any], Any]] = {
    "list": lambda net: [net.layer],
    "partial": lambda net: partial(net.layer),
    "method": lambda net: net.layer.forward,
    "no parameters": lambda net: {"act": nn.Tanh(), "fn": closure(nn.ReLU())},
    "frozen": lambda net: (nn.Linear(3, 3).requires_grad_(False),),
}


@pytest.mark.parametrize("keep", REACHED.values(), ids=REACHED)
def test_what_is_kept_beside_and_copied_with_the_module_stays(keep: Callable[[Any], Any]) -> None:
    module = Keeps(keep)
    apply, params = functionalize(module)
    zeros = {name: torch.zeros_like(p) for name, p in params.items()}
    assert not apply(zeros, torch.ones(2, 3)).any()


class OwnLSTM(nn.LSTM):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return super().forward(2 * input, hx)


def distributed() -> nn.Module:
    module = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(module)
    return module


def computed() -> nn.Module:
    module = nn.Linear(3, 3)
    module.extra = module.weight * 2  # type: ignore[assignment]
    return module


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: torch.relu, TypeError, "a torch.nn.Module was expected, got builtin_function_or_method"),
        (lambda: nn.Linear, TypeError, "a torch.nn.Module was expected, got type"),
        (
            lambda: nn.Sequential(nn.SyncBatchNorm(3)),
            NotImplementedError,
            "SyncBatchNorm at '0'.*Use nn.BatchNorm2d",
        ),
        (
            lambda: nn.Sequential(nn.LazyLinear(3)),
            ValueError,
            "LazyLinear at '0' has parameters without a shape",
        ),
        (lambda: nn.LazyBatchNorm1d(affine=False), ValueError, "LazyBatchNorm1d at 'the top' has parameters"),
        (
            lambda: nn.DataParallel(nn.Linear(3, 3)),
            NotImplementedError,
            "DataParallel at 'the top'.*its .module",
        ),
        (distributed, NotImplementedError, "DistributedDataParallel at 'the top'.*its .module"),
        (
            lambda: torch.compile(nn.Linear(3, 3)),
            NotImplementedError,
            "OptimizedModule.*before torch.compile",
        ),
        (Hidden, ValueError, "Hidden at 'the top' keeps parameters in the attribute 'weights'"),
        (
            lambda: nn.Sequential(OwnLSTM(3, 3)),
            NotImplementedError,
            "OwnLSTM at '0' overrides the forward of a rec",
        ),
        (computed, ValueError, "Linear must be a module that can be copied, but it holds a computed tensor"),
    ],
)
def test_modules_that_cannot_be_pure_are_refused(make: Callable[[], Any], kind: type, text: str) -> None:
    with pytest.raises(kind, match=text):
        functionalize(make())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_modules_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="TorchScript hides its operations"):
        functionalize(torch.jit.script(nn.Linear(3, 3)))


@pytest.mark.parametrize(
    ("make", "policy", "kind", "text"),
    [
        (
            lambda: nn.BatchNorm1d(3),
            "running",
            ValueError,
            'batch_norm must be "batch", "frozen" or None, got \'run',
        ),
        (
            lambda: nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)),
            "frozen",
            ValueError,
            "needs running statistics, but BatchNorm1d at '0' keeps none",
        ),
        (lambda: OwnForward(3), "batch", NotImplementedError, "cannot reach OwnForward at 'the top'"),
    ],
)
def test_policies_that_cannot_hold_are_refused(
    make: Callable[[], Any], policy: Any, kind: type, text: str
) -> None:
    with pytest.raises(kind, match=text):
        functionalize(make(), batch_norm=policy)


# Recurrent layers ----------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"batch_first": True, "bias": False},
    {"num_layers": 3, "batch_first": True, "dropout": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("start", [True, False])
def test_recurrent_layers_equal_torch(kind: Any, options: dict[str, Any], batched: bool, start: bool) -> None:
    layer = kind(3, 4, **options).double().eval()
    x = torch.randn(5, 2, 3, dtype=torch.float64) if batched else torch.randn(5, 3, dtype=torch.float64)
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    batch = ((5 if layer.batch_first else 2),) if batched else ()
    h = torch.randn(rows, *batch, 4, dtype=torch.float64)
    hx = () if not start else ((h, h + 1),) if kind is nn.LSTM else (h,)
    apply, params = functionalize(layer)
    assert_trees_close(apply(params, x, *hx), layer(x, *hx), 1e-12)


def test_recurrent_projection_and_relu_equal_torch() -> None:
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    for layer in (nn.LSTM(3, 4, 2, proj_size=2, bidirectional=True), nn.RNN(3, 4, nonlinearity="relu")):
        layer = layer.double()
        apply, params = functionalize(layer)
        assert_trees_close(apply(params, x), layer(x), 1e-12)
        assert apply.module.state_dict().keys() == layer.state_dict().keys()


def test_recurrent_dropout_lies_between_layers_only() -> None:
    apply, params = functionalize(nn.GRU(3, 4, 2, dropout=1.0))
    second_sees_nothing = {**params, "weight_ih_l1": params["weight_ih_l1"] * 7}
    x = torch.randn(5, 2, 3)
    assert_trees_equal(apply(params, x), apply(second_sees_nothing, x))
    assert apply(params, x)[0].abs().max() > 0


def test_recurrent_layers_refuse_packed_sequences_and_wrong_shapes() -> None:
    apply, params = functionalize(nn.LSTM(3, 4))
    with pytest.raises(NotImplementedError, match="LSTM takes padded sequences only, got a PackedSequence"):
        apply(params, pack_sequence([torch.randn(5, 3), torch.randn(2, 3)]))
    with pytest.raises(ValueError, match=r"LSTM: input must be \[time, batch, 3\].*got shape \(5, 2, 4\)"):
        apply(params, torch.randn(5, 2, 4))
