"""The face of ``torch.optim`` on a learned optimiser, for ordinary training loops."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmeta import tree
from fmeta.learned.blocks import BLOCK, Blockwise
from fmeta.learned.rule import LearnedOptimizer, usable
from fmeta.parallel import Unsupported, compiled, compiles_itself
from fmeta.rates import number
from fmeta.types import Params

LEAST = 16
"""Blocks from which on the parameters go by blocks, for speed; and tensors, since a kernel of each takes long to build:
48 small ones 34 s, where by blocks any number takes as long as one."""


def saved_in(state_dict: Any) -> dict[str, Any]:
    """What a state dict holds of a learned optimiser; of none where that is damaged or missing."""
    own = state_dict.get("learned") if isinstance(state_dict, dict) and "param_groups" in state_dict else None
    kinds = {"rule": str, "settings": dict, "state": dict, "skipped": int}
    if isinstance(own, dict) and all(isinstance(own.get(name), kind) for name, kind in kinds.items()):
        if all(isinstance(leaf, Tensor) for leaf in own["state"].values()):
            return own
    return {"rule": "another optimiser, or a damaged one,", "settings": {}}


def timeless(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that a state depends on: not how the clock goes."""
    return {name: value for name, value in settings.items() if name != "longest"}


class Optimizer(torch.optim.Optimizer):
    """A learned optimiser that steps the parameters of a module.

    ``zero_grad``, ``backward``, ``step``, parameter groups, ``state_dict`` and schedulers of torch work as with any
    optimiser; a group's ``lr`` multiplies the steps that were learned (1 by default). All parameters that
    have a gradient are updated together, by one kernel or by blocks, and share the count of steps; those without keep
    their state until they have one again. A gradient that is not finite, or the square of which is not, is passed over,
    and counted in ``skipped``.

    Args:
        params: parameters, or groups of them.
        rule: the learned optimiser.
        theta: its weights.
        steps: how many steps there will be; the rule plans by it. It may go on afterwards, as at the end.
        lr: factor of the steps, at least 0.

    Raises:
        ValueError: for an ``lr`` below 0 or not finite, or weights of another architecture.
    """

    def __init__(
        self,
        params: Any,
        rule: LearnedOptimizer,
        theta: Params,
        *,
        steps: int | None = None,
        lr: float = 1.0,
    ) -> None:
        """Nothing is allocated before the first step."""
        super().__init__(params, {"lr": lr})
        self.passed_over = torch.zeros((), dtype=torch.int64)
        self.rule, self.theta, self.steps = rule, tree.detach(theta), steps
        rule(self.theta, steps)
        self.kept: dict[str, Tensor] = {}
        self.kind: tuple[Any, ...] = ()
        self.current: Any = None
        self.made: dict[tuple[Any, ...], Blockwise | None] = {}
        self.blocks: Blockwise | None = None
        self.kernel = compiled("learned optimizer", self._update)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; refuses an ``lr`` that is below 0 or not finite, and complex parameters."""
        if isinstance(param_group, dict):  # torch refuses others
            lr = param_group.get("lr", self.defaults["lr"])
            number("learned.Optimizer", "lr", float(lr) if isinstance(lr, Tensor) and lr.numel() == 1 else lr)
        super().add_param_group(param_group)
        if any(p.is_complex() for p in self.param_groups[-1]["params"]):
            self.param_groups.pop()
            raise TypeError(
                "learned.Optimizer: parameters must be real, got complex ones. Train torch.view_as_real of them."
            )

    def _update(self, theta: Params, grads: Params, state: Any, params: Params, rates: Params) -> Any:
        updates, after = self.rule(theta, self.steps).update(grads, state, params)
        moved = {name: p + rates[name] * updates[name] for name, p in params.items()}
        return moved, after, usable(grads)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient; returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        owners: dict[str, tuple[Tensor, float]] = {}
        index = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    owners[f"p{index}"] = (p, group["lr"])
                index += 1
        if not owners:
            return loss
        params = {name: p.detach() for name, (p, _) in owners.items()}
        grads: Any = {name: p.grad for name, (p, _) in owners.items()}
        if any(g.is_sparse for g in grads.values()):
            raise RuntimeError(
                "learned.Optimizer: gradients must be dense, got a sparse one. Make the embedding with sparse=False."
            )
        state = self._state(params)
        rates = {
            name: torch.as_tensor(lr, dtype=p.dtype, device=p.device) for name, (p, lr) in owners.items()
        }
        theta = {name: leaf.to(p.device) for name, leaf in self.theta.items()}
        fine = self._moved(theta, grads, state, params, rates)
        torch.autograd.graph.increment_version([p for p, _ in owners.values()])
        self.passed_over = (
            self.passed_over.to(fine.device) + ~fine
        )  # read when it is asked for: no step waits
        return loss

    def _moved(self, theta: Params, grads: Params, state: Any, params: Params, rates: Params) -> Tensor:
        """Update the parameters and the state; whether the gradients were finite."""
        if self.blocks:
            try:
                self.current, fine = self.blocks(theta, grads, state, params, rates)
                return fine
            except Unsupported:  # its compiler failed, and nothing has changed
                state = self.blocks.kept(state, list(params))
                self.blocks = self.made[self.kind] = None
        moved, self.current, fine = self.kernel(theta, grads, state, params, rates)
        for name, p in params.items():
            p.copy_(moved[name])
        return fine

    @property
    def skipped(self) -> int:
        """Steps whose gradients were not finite."""
        return int(self.passed_over)

    def _state(self, params: Params) -> Any:
        """The state of these parameters: that of the last step where they are the same, else what is known of each."""
        kind = tuple((name, p.shape, p.dtype, p.device) for name, p in params.items())
        if self.current is not None and kind == self.kind:
            return self.current
        self._keep()
        if self.blocks:
            self.blocks.rest()
        self.kind = kind
        fresh = self.rule(self.theta, self.steps).init(params)
        leaves = [self.kept.get(name, leaf).to(leaf.device, leaf.dtype) for name, leaf in tree.paths(fresh)]
        state = tree.unflatten([leaf.clone() for leaf in leaves], tree.flatten(fresh)[1])
        if kind not in self.made:
            self.made[kind] = self._blockwise(params)
        self.blocks = self.made[kind]
        return self.blocks.start(state) if self.blocks else state

    def _blockwise(self, params: Params) -> Blockwise | None:
        """The update by blocks, where the rule has one and the parameters are many enough to gain by it."""
        plain = all(p.dtype == torch.float32 and compiles_itself(p.device) for p in params.values())
        total = sum(p.numel() for p in params.values())
        many = len(params) >= LEAST or total >= BLOCK * max(LEAST, torch.get_num_threads())
        if self.rule.blocks is None or not (plain and many):
            return None
        return self.rule.blocks([p.shape for p in params.values()], self.steps)

    def _keep(self) -> None:
        """Note the state by name."""
        if self.current is not None:
            state = (
                self.blocks.kept(self.current, [name for name, *_ in self.kind])
                if self.blocks
                else self.current
            )
            self.kept |= dict(tree.paths(state))

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the state of the rule under ``learned``."""
        self._keep()
        own = {
            "rule": self.rule.name,
            "settings": self.rule.settings,
            "skipped": self.skipped,
            "state": {name: leaf.clone() for name, leaf in self.kept.items()},
        }
        return {**super().state_dict(), "learned": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken.

        Raises:
            ValueError: for that of another optimiser, or of parameters of other shapes.
        """
        own = saved_in(state_dict)
        if (own["rule"], timeless(own["settings"])) != (self.rule.name, timeless(self.rule.settings)):
            raise ValueError(
                f"learned.Optimizer: the state dict must be one of {self.rule.name} with {self.rule.settings}, got one "
                f"of {own['rule']} with {own['settings']}. Start without it."
            )
        self._check_shapes(own["state"])
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "learned"})
        self.kept = {name: leaf.clone() for name, leaf in own["state"].items()}
        self.current, self.kind = None, ()
        self.passed_over = torch.tensor(own["skipped"])

    def _check_shapes(self, state: dict[str, Tensor]) -> None:
        """Refuse what is known of parameters of other shapes, before anything of it is taken."""
        params = [p for group in self.param_groups for p in group["params"]]
        fresh = self.rule(self.theta, self.steps).init({f"p{i}": p.detach() for i, p in enumerate(params)})
        for name, leaf in tree.paths(fresh):
            if name in state and state[name].shape != leaf.shape:
                raise ValueError(
                    f"learned.Optimizer: the state dict must be of parameters of the same shapes, got "
                    f"{list(state[name].shape)} for {name!r}, here {list(leaf.shape)}."
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimizer:
        """A copy for the copies of its parameters."""
        self._keep()
        groups, lr = copy.deepcopy(self.param_groups, memo), self.defaults["lr"]
        made = Optimizer(groups, self.rule, self.theta, steps=self.steps, lr=lr)
        made.kept, made.passed_over = copy.deepcopy(self.kept), self.passed_over.clone()
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Functions are no data."""
        raise TypeError(
            "learned.Optimizer: it cannot be pickled, got a request to. Save optimizer.state_dict(), and make the "
            "optimiser again by fmeta.learned.load(...)."
        )
