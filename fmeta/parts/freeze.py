"""Which parts of a model are learned: the rest is frozen; parts by their place in the model.

Which of the learned parts adapt to a task is the algorithm's own option, ``adapts=``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from fmeta.parts.select import Pattern, select
from fmeta.types import Params

Model = tuple[Callable[..., Any], Params]
"""``(apply, params)``."""
Number = tuple[int, str]
"""Of a block, with the letter behind it: ``5``, ``5b``."""


def freeze(apply: Callable[..., Any], params: Params, learns: Pattern) -> Model:
    """The same function of the chosen parameters alone; the others are constants from now on.

    Args:
        apply: ``(params, *args) -> outputs``, as ``functionalize`` returns it.
        params: all that it takes.
        learns: names of what stays a parameter, see ``fmeta.select``.

    Raises:
        ValueError: if nothing is chosen, or a pattern matches no name.

    >>> import torch
    >>> apply, params = freeze(lambda p, x: p["a"] * x + p["b"], {"a": torch.tensor(2.0), "b": torch.tensor(1.0)}, "b")
    >>> list(params), apply(params, torch.tensor(3.0))
    (['b'], tensor(7.))
    """
    learned = select(params, learns)
    constants = {name: p.detach() for name, p in params.items() if name not in learned}
    order = list(params)

    def part(learned: Params, /, *args: Any, **kwargs: Any) -> Any:
        known = {**constants, **learned}
        return apply({name: known[name] for name in order}, *args, **kwargs)

    return part, learned


def last_blocks(names: Mapping[str, Any], count: int) -> list[str]:
    """Names from the ``count``-th last block on, with all that comes behind the blocks: a pattern for ``adapts``.

    Blocks are what is numbered: ``encoder.layer.5``, ``features.18``, ``layer4``, ``inception5b``. Where several
    parts are numbered, the outermost one with the most blocks counts. Numbered parts without a matrix or a
    convolution (norms) are no blocks of their own: they go with what is in front of them.

    Args:
        names: parameters in the order of the module, ``params`` say.
        count: how many blocks.

    Raises:
        ValueError: where nothing is numbered, or there are fewer blocks.

    >>> last_blocks({"stem.w": 0, "blocks.0.w": 0, "blocks.1.w": 0, "head.w": 0}, 1)
    ['blocks.1.w', 'head.w']
    """
    order = list(names)
    found: dict[str, dict[Number, list[int]]] = {}
    lettered = letter_siblings(order)
    for place, name in enumerate(order):
        for prefix, number in numbers(name):
            if not number[1] or len(lettered[prefix]) > 1:
                found.setdefault(prefix, {}).setdefault(number, []).append(place)
                break
    blocks = list(max(found.values(), key=len, default={}).values())
    large = [block for block in blocks if any(getattr(names[order[at]], "ndim", 2) > 1 for at in block)]
    starts = sorted(block[0] for block in large or blocks)
    if not 1 <= count <= len(starts):
        raise ValueError(
            f"last_blocks: count must be in 1 .. {len(starts)}, the numbered blocks of this model, got {count}."
        )
    return order[starts[-count] :]


def numbers(name: str) -> Iterator[tuple[str, Number]]:
    """The numbered modules in a parameter's name, outermost first: what is in front of the number, and it."""
    parts = name.split(".")[:-1]
    for depth, part in enumerate(parts):
        numbered = re.fullmatch(r"(.*?)(\d+)([a-z]?)", part)
        if numbered:
            yield ".".join([*parts[:depth], numbered[1]]), (int(numbered[2]), numbered[3])


def letter_siblings(order: list[str]) -> dict[str, set[Number]]:
    """Numbers with a letter by what is in front of them: several are blocks, a single one is a word (``conv2d``)."""
    found: dict[str, set[Number]] = {}
    for name in order:
        for prefix, number in numbers(name):
            if number[1]:
                found.setdefault(prefix, set()).add(number)
    return found


def norm_names(module: nn.Module) -> list[str]:
    """Names of the weights and biases of norm layers: a pattern for ``adapts`` or ``learns``.

    >>> norm_names(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    ['1.weight', '1.bias']
    """
    kinds = (
        nn.modules.batchnorm._NormBase,
        nn.LayerNorm,
        nn.GroupNorm,
        nn.RMSNorm,
    )  # batch and instance norm
    norms = [name for name, layer in module.named_modules() if isinstance(layer, kinds)]
    inside = {f"{name}.{part}" if name else part for name in norms for part in ("weight", "bias")}
    return [name for name, _ in module.named_parameters() if name in inside]
