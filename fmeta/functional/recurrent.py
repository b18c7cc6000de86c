"""RNN, LSTM and GRU written out step by step: torch's own cannot be batched over the weights of tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, State, Tensor, Tensor | None], State]


class Recurrent(nn.Module):
    """The forward of ``nn.RNN``, ``nn.LSTM`` and ``nn.GRU`` over the attributes and parameters of one.

    It is no subclass of theirs, because torch.compile refuses those.
    """

    def forward(self: Any, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:  # noqa: D102
        if isinstance(input, PackedSequence):
            raise NotImplementedError(
                f"functionalize: {self.mode} takes padded sequences only, got a PackedSequence, whose shape "
                "depends on the data. Pad the batch and mask the loss."
            )
        if input.dim() not in (2, 3) or input.shape[-1] != self.input_size:
            raise ValueError(
                f"{self.mode}: input must be [time, batch, {self.input_size}], or without batch, got shape "
                f"{tuple(input.shape)}."
            )
        batch_dim = 0 if self.batch_first else 1
        x = input if input.dim() == 3 else input.unsqueeze(batch_dim)
        x = x.transpose(0, 1) if self.batch_first else x  # [time, batch, feature]
        x, state = self._layers(x, self._start(x, hx, batched=input.dim() == 3))
        x = x.transpose(0, 1) if self.batch_first else x
        if input.dim() == 2:
            x, state = x.squeeze(batch_dim), tuple(s.squeeze(1) for s in state)
        return x, state if self.mode == "LSTM" else state[0]

    def _start(self: Any, x: Tensor, hx: Any, *, batched: bool) -> State:
        """Initial states, each ``[layers * directions, batch, size]``."""
        sizes = [self.proj_size or self.hidden_size] + [self.hidden_size] * (self.mode == "LSTM")
        if hx is None:
            rows = self.num_layers * (1 + self.bidirectional)
            return tuple(x.new_zeros(rows, x.shape[1], size) for size in sizes)
        given = tuple(hx) if self.mode == "LSTM" else (hx,)
        return given if batched else tuple(h.unsqueeze(1) for h in given)

    def _layers(self: Any, x: Tensor, start: State) -> tuple[Tensor, State]:
        cell, directions = CELLS[self.mode], 1 + self.bidirectional
        last = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                row = layer * directions + direction
                weights = {name.rsplit("_l", 1)[0]: getattr(self, name) for name in self._all_weights[row]}
                state = tuple(h[row] for h in start)
                output, state = _run(cell, x.flip(0) if direction else x, state, weights)
                outputs.append(output.flip(0) if direction else output)
                last.append(state)
            x = torch.cat(outputs, -1)
            if layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        return x, tuple(torch.stack(parts) for parts in zip(*last, strict=True))


def _run(cell: Cell, x: Tensor, state: State, weights: dict[str, Tensor]) -> tuple[Tensor, State]:
    projected = F.linear(x, weights["weight_ih"], weights.get("bias_ih"))
    outputs = []
    for step in projected.unbind(0):
        state = cell(step, state, weights["weight_hh"], weights.get("bias_hh"))
        if "weight_hr" in weights:
            state = (F.linear(state[0], weights["weight_hr"]), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs), state


def _plain(activation: Callable[[Tensor], Tensor]) -> Cell:
    return lambda x, state, weight, bias: (activation(x + F.linear(state[0], weight, bias)),)


def _lstm(x: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    i, f, g, o = (x + F.linear(state[0], weight, bias)).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(x: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    (h,) = state
    x_r, x_z, x_n = x.chunk(3, -1)
    h_r, h_z, h_n = F.linear(h, weight, bias).chunk(3, -1)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return ((1 - z) * n + z * h,)


CELLS: dict[str, Cell] = {
    "RNN_TANH": _plain(torch.tanh),
    "RNN_RELU": _plain(torch.relu),
    "LSTM": _lstm,
    "GRU": _gru,
}
