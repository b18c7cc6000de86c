"""An encoder in two parts: lower layers that are frozen and run once, upper layers that learn."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fmeta.models.encoder import CALL, Encoder, Lower


class Reached(Exception):
    """The layer where the lower part ends; carries its input."""


def layers_of(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of an encoder's layers, with its name.

    Raises:
        NotImplementedError: where there is none (ALBERT's layers share weights).
    """
    count = getattr(model.config, "num_hidden_layers", 0)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise NotImplementedError(
        f"{CALL}: {type(model).__name__} must have a list of {count} layers to be parted, got none. Learn all of it."
    )


def part(encoder: Encoder, count: int) -> tuple[Lower, Encoder]:
    """Part an encoder below its last ``count`` layers.

    ``upper(**lower(x))`` is ``encoder(**x)``. Parameters of ``upper`` have the names that they have in the encoder.

    Args:
        encoder: from ``fmeta.models.encoder``.
        count: layers of the upper part, at least 1; all of them leave the embeddings to the lower part.

    Returns:
        ``lower``, a function of ``{"input_ids", "attention_mask"}`` that returns what ``upper`` takes, without
        gradient; and ``upper``, an ``Encoder`` of its own.

    Raises:
        ValueError: for another number of layers.
        NotImplementedError: for a model that cannot be parted so.
    """
    name, layers = layers_of(encoder.model)
    if not isinstance(count, int) or not 1 <= count <= len(layers):
        raise ValueError(
            f"{CALL}: the layers that learn must be 1 .. {len(layers)} for {type(encoder.model).__name__}, got {count}."
        )
    lower, upper = lower_of(encoder, layers[-count]), upper_of(encoder, name, len(layers) - count)
    check_parts(encoder, lower, upper)
    return lower, upper


def lower_of(encoder: Encoder, first: nn.Module) -> Lower:
    """What goes into layer ``first``, as a function of token ids."""

    def stop(layer: nn.Module, args: Any, kwargs: Any) -> None:
        raise Reached(args[0] if args else kwargs["hidden_states"])

    def lower(x: dict[str, Tensor]) -> dict[str, Tensor]:
        handle = first.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad():
                encoder(**x)
        except Reached as found:
            return {"hidden": found.args[0], "attention_mask": x["attention_mask"]}
        finally:
            handle.remove()
        raise NotImplementedError(f"{CALL}: {type(encoder.model).__name__} must call its layers in turn.")

    return lower


def upper_of(encoder: Encoder, name: str, begin: int) -> Encoder:
    """A copy of an encoder that begins at a layer: what is below passes on what it is given."""
    below = [*layers_of(encoder.model)[1][:begin]]
    words = encoder.model.get_input_embeddings()  # type: ignore[operator]
    place = next(n for n, m in encoder.model.named_modules() if m is words)
    around = place.rpartition(".")[0]
    if around and not name.startswith(f"{around}."):
        place = around  # all embeddings: of positions too
    kept = {id(m): None for m in (*below, encoder.model.get_submodule(place))}
    upper = copy.deepcopy(encoder, dict(kept))
    above, _, last = place.rpartition(".")
    setattr(upper.model.get_submodule(above), last, Given())
    found = upper.model.get_submodule(name)
    returns = returns_tuples(encoder.model)
    for i in range(begin):
        found[i] = Skip(returns)  # type: ignore[operator]
    return upper


def returns_tuples(model: Any) -> bool:
    """Whether a layer returns its hidden states as the first of several things."""
    seen: list[bool] = []
    note = lambda layer, args, out: seen.append(isinstance(out, tuple))  # noqa: E731
    handle = layers_of(model)[1][0].register_forward_hook(note)
    try:
        with torch.no_grad():
            model(input_ids=torch.ones(1, 2, dtype=torch.int64, device=device_of(model)))
    finally:
        handle.remove()
    return seen[0]


def check_parts(encoder: Encoder, lower: Lower, upper: Encoder) -> None:
    """Make sure that the two parts compute what the whole does."""
    x = {"input_ids": torch.arange(2, 8).view(2, 3), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    x = {key: value.to(device_of(encoder)) for key, value in x.items()}
    name = type(encoder.model).__name__
    with torch.no_grad():
        whole = encoder(**x)
        try:
            parted = upper(**lower(x))
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, StopIteration) as error:
            raise NotImplementedError(
                f"{CALL}: {name} cannot be parted at a layer ({error}). Learn all of it."
            ) from error
    if not torch.allclose(whole, parted, atol=1e-4):
        raise NotImplementedError(
            f"{CALL}: {name} cannot be parted at a layer: the parts compute something else. Learn all of it."
        )


def device_of(module: nn.Module) -> torch.device:
    """Where a model is."""
    return next(module.parameters()).device


class Given(nn.Module):
    """In the place of embeddings: the hidden states that the upper part is given."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        found = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
        return next(x for x in found if x.ndim == 3)


class Skip(nn.Module):
    """In the place of a lower layer: passes its input on."""

    def __init__(self, as_tuple: bool) -> None:
        """Return what the layer would."""
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        return (hidden_states,) if self.as_tuple else hidden_states
