"""Reverse-mode derivatives of functions of pytrees in which integer leaves (counters, labels) are constants."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vjp

from fmeta import tree
from fmeta.types import Tree


def split(of: Tree) -> tuple[list[Tensor], Callable[[Any], Tree]]:
    """The floating leaves of a tree, and the function that puts others in their place."""
    leaves, spec = tree.flatten(of)

    def join(floats: Any) -> Tree:
        replacement = iter(floats)
        return tree.unflatten([next(replacement) if x.is_floating_point() else x for x in leaves], spec)

    return [x for x in leaves if x.is_floating_point()], join


def pullback(fn: Callable[..., Tree], *primals: Tree) -> Callable[[Tree], tuple[Tree, ...]]:
    """The vector-Jacobian product of ``fn`` at ``primals``: cotangents of its output to those of its inputs."""
    floats, join = split(primals)
    _, into_zeros = split(tree.zeros_like(primals))
    pull = vjp(lambda *leaves: tuple(split(fn(*join(leaves)))[0]), *floats)[1]
    return lambda cotangents: into_zeros(pull(tuple(split(cotangents)[0])))


def gradient(
    fn: Callable[..., tuple[Tensor, Any]], *primals: Tree, scale: float = 1.0
) -> tuple[tuple[Tree, ...], Any]:
    """Gradients of the scalar that ``fn`` returns first, and what it returns beside it.

    ``scale`` multiplies the scalar and divides the gradients, for numbers that half precision has no room for.
    """
    floats, join = split(primals)
    _, into_zeros = split(tree.zeros_like(primals))
    if not floats:
        return into_zeros(()), fn(*primals)[1]

    def scaled(leaves: list[Tensor]) -> tuple[Tensor, Any]:
        value, aux = fn(*join(leaves))
        return value if scale == 1.0 else value * scale, aux

    grads, (_, aux) = grad_and_value(scaled, has_aux=True)(floats)
    return into_zeros(grads if scale == 1.0 else [g / scale for g in grads]), aux


@functools.cache
def load_forward_mode() -> None:
    """Import what ``torch.func.jvp`` imports on first use, without its warning that torch.jit is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def along(fn: Callable[[Tree], Tensor], at: Tree, direction: Tree) -> Tensor:
    """The derivative of a scalar function in a direction, by forward mode."""
    floats, join = split(at)
    # an expanded tensor cannot become a dual number, which is written to
    floats = [x.clone() if 0 in x.stride() else x for x in floats]
    return torch.func.jvp(lambda leaves: fn(join(leaves)), (floats,), (split(direction)[0],))[1]
