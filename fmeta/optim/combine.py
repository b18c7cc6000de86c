"""Transforms made of transforms: one after another, on a part of the parameters, in an inner loop."""

from __future__ import annotations

from typing import Any

import torch

from fmeta import tree
from fmeta.parts.select import Pattern, matches
from fmeta.types import Transform, Tree


def as_inner(transform: Transform) -> Transform:
    """The form of a rule that is safe to differentiate through: ``transform.inner()`` where there is one."""
    return transform if transform.inner is None else transform.inner()


def chain(*transforms: Transform) -> Transform:
    """Apply transforms in order: each takes the updates of the one before, the first takes the gradients.

    Clipping comes before the optimiser, ``chain(clip_by_norm(1.0), adam(1e-3))``; after it, it limits the
    step. The inner form is the chain of inner forms.

    Example:
        >>> import torch
        >>> from fmeta.optim import clip_by_value, sgd
        >>> rule, params = chain(clip_by_value(1.0), sgd(0.1)), {"w": torch.zeros(2)}
        >>> rule.update({"w": torch.tensor([5.0, 0.5])}, rule.init(params), params)[0]["w"]
        tensor([-0.1000, -0.0500])
    """
    for part in transforms:
        _check_transform("chain", part)

    def init(params: Tree) -> tuple[Tree, ...]:
        return tuple(part.init(params) for part in transforms)

    def update(grads: Tree, state: tuple[Tree, ...], params: Tree) -> tuple[Tree, tuple[Tree, ...]]:
        after = []
        for part, part_state in zip(transforms, state, strict=True):
            grads, part_state = part.update(grads, part_state, params)
            after.append(part_state)
        return grads, tuple(after)

    unsafe = any(part.inner for part in transforms)
    return Transform(init, update, (lambda: chain(*map(as_inner, transforms))) if unsafe else None)


def masked(transform: Transform, pattern: Pattern) -> Transform:
    """Update only the parameters whose names match; the others get zero updates and no state.

    ``transform`` sees a dict of the matching parameters alone: a norm it clips by is theirs, and a
    per-parameter rate has their names as keys. The inner form is the masked inner form.

    Args:
        transform: what updates the matching parameters.
        pattern: a glob (``"*.bias"``), the name of a module, which stands for all its parameters
            (``"head"``), ``"!..."`` for all others, a sequence of these, or a function from name to bool.

    Raises:
        ValueError: nothing matches, when the state is made or used.

    Example:
        >>> import torch
        >>> from fmeta.optim import sgd
        >>> rule = masked(sgd(0.1), "head")
        >>> params = {"body.w": torch.ones(1), "head.w": torch.ones(1)}
        >>> rule.update(params, rule.init(params), params)[0]
        {'body.w': tensor([0.]), 'head.w': tensor([-0.1000])}
    """
    _check_transform("masked", transform)

    def part(values: Tree) -> dict[str, Any]:
        named = dict(tree.paths(values))
        return {name: named[name] for name in matches(pattern, list(named))}

    def init(params: Tree) -> Tree:
        return transform.init(part(params))

    def update(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        updates, state = transform.update(part(grads), state, part(params))
        _, spec = tree.flatten(grads)
        every = [updates[n] if n in updates else torch.zeros_like(g) for n, g in tree.paths(grads)]
        return tree.unflatten(every, spec), state

    unsafe = transform.inner is not None
    return Transform(init, update, (lambda: masked(as_inner(transform), pattern)) if unsafe else None)


def _check_transform(call: str, part: object) -> None:
    if not isinstance(part, Transform):
        raise TypeError(
            f"{call}: expected a Transform, got {type(part).__name__}. "
            "Pass what a factory such as sgd(0.1) returns."
        )
