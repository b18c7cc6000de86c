"""Who runs: fmeta and its peers behind one interface."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks import harness
from benchmarks.peers import higher, loop, ours, torchopt
from benchmarks.peers.base import Absent, Contender, Setting
from benchmarks.peers.jax_client import Remote
from benchmarks.problems import Problem
from fmeta.types import Params


class Local:
    """A contender in this process."""

    def __init__(self, spec: Spec, problem: Problem, setting: Setting) -> None:
        """Nothing runs yet."""
        self.spec, self.problem, self.setting = spec, problem, setting
        self.before = harness.memory_mib(setting.device)

    def exact(self, tasks: int) -> Params:  # noqa: D102
        with harness.limit(self.setting.limit):
            return self.spec.exact(self.problem.double(tasks))()

    def first(self) -> tuple[float, Params]:  # noqa: D102
        most = self.setting.compile_limit if self.spec.compiles else self.setting.limit
        with harness.limit(most):
            self.call = self.spec.make(self.problem)
            found = harness.seconds(self.call, self.setting.device)
            if self.spec.compiles:
                self.call()  # fmeta records its second call, which is slower than those to come
            return found

    def times(self, budget: float, most: int) -> list[float]:  # noqa: D102
        with harness.limit(budget + 2 * self.setting.limit):
            return harness.block(self.call, budget, most, self.setting.device)

    def peak(self) -> dict[str, float]:  # noqa: D102
        self.first()
        warm = harness.memory_mib(self.setting.device)
        added = harness.added_mib(warm, self.call, self.setting.device)
        return {"call_mib": added, "peak_mib": added + warm - self.before}

    def close(self) -> None:
        """Drop the function and what it caught."""
        self.call = None  # type: ignore[assignment]


Make = Callable[[Problem], Callable[[], Params]]


class Spec(NamedTuple):
    """A contender before it has a problem."""

    make: Make
    exact: Make
    """What computes the float64 gradient of the agreement check."""
    compiles: bool = False
    package: str = ""
    """What must be installed."""
    form: str = ""
    """Of the JAX contenders: ``unrolled`` or ``scan``."""
    is_step: bool = False
    """Whether it times a whole outer step; its gradients are fmeta's."""

    def start(self, problem: Problem, setting: Setting) -> Contender:
        """Ready for a problem; raises ``Absent``."""
        if self.form:
            return Remote(self.form, problem, setting)
        if self.package and importlib.util.find_spec(self.package) is None:
            raise Absent(f"{self.package} is not installed; `pip install -e '.[bench]'` brings it")
        return Local(self, problem, setting)


CONTENDERS = {
    "fmeta": Spec(ours.make, ours.eager, compiles=True),
    "fmeta-step": Spec(ours.step, ours.eager, compiles=True, is_step=True),
    "loop": Spec(loop.make, loop.make),
    "higher": Spec(higher.make, higher.make, package="higher"),
    "torchopt": Spec(torchopt.make, torchopt.make, package="torchopt"),
    "vmap": Spec(ours.nested, ours.nested),
    "jax": Spec(loop.make, loop.make, compiles=True, form="unrolled"),
    "jax-scan": Spec(loop.make, loop.make, compiles=True, form="scan"),
}
"""By the names that ``--peers`` takes. The makers of the JAX rows are not used."""
PEERS = tuple(name for name in CONTENDERS if name != "fmeta")
ABOUT = {
    "fmeta": "fmeta.meta_grad with Plan(): compiled",
    "fmeta-step": "fmeta.meta_step with Adam: a whole outer step",
    "loop": "one task after another on torch.autograd, create_graph=True",
    "higher": "facebookresearch/higher",
    "torchopt": "TorchOpt's MetaSGD",
    "vmap": "grad(mean(vmap(loss))) by torch.func, uncompiled (fmeta's nested engine)",
    "jax": "JAX jit(grad(vmap)), inner loop unrolled, NHWC",
    "jax-scan": "the same with lax.scan over inner steps",
}


def difference(got: Params, want: Params) -> float:
    """``|got - want| / |want|`` over all weights together; raises if the names differ."""
    if set(got) != set(want):
        missing = sorted(set(want) ^ set(got))
        raise RuntimeError(
            f"difference: gradients of the same weights were expected, only one has {missing}."
        )
    flat = lambda tree: torch.cat([tree[name].detach().double().cpu().flatten() for name in want])  # noqa: E731
    return ((flat(got) - flat(want)).norm() / flat(want).norm()).item()
