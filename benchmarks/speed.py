"""A whole outer step of fmeta against a plain loop on torch.autograd, the way MAML is usually written.

Both run in this process on the same tasks; the gradients must agree before anything is timed.

    python -m benchmarks.speed
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

import fmeta
from benchmarks.harness import record, table, timed
from benchmarks.problems import sinusoid
from fmeta.types import Params, Task

LR = 0.01
CELLS = ((25, 1), (100, 1), (25, 10), (100, 10))


def loop(net: nn.Module, params: Params, tasks: Task, steps: int) -> list[Tensor]:
    """The meta-gradient of MAML, task after task."""
    names, start = list(params), [p.detach().requires_grad_() for p in params.values()]

    def loss(weights: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(functional_call(net, dict(zip(names, weights, strict=True)), (x,)), y)

    total = [torch.zeros_like(p) for p in start]
    count = len(tasks.support.x)
    for i in range(count):
        weights = start
        for _ in range(steps):
            grads = torch.autograd.grad(
                loss(weights, tasks.support.x[i], tasks.support.y[i]), weights, create_graph=True
            )
            weights = [w - LR * g for w, g in zip(weights, grads, strict=True)]
        query = loss(weights, tasks.query.x[i], tasks.query.y[i])
        total = [t + g / count for t, g in zip(total, torch.autograd.grad(query, start), strict=True)]
    return total


def loop_step(net: nn.Module, params: Params, tasks: Task, steps: int, outer: torch.optim.Optimizer) -> None:
    """One outer step of the loop with torch's own Adam."""
    for p, g in zip(outer.param_groups[0]["params"], loop(net, params, tasks, steps), strict=True):
        p.grad = g
    outer.step()


def main() -> None:
    """Print the table."""
    rows = []
    for tasks, steps in CELLS:
        net, loss, batch = sinusoid(tasks)
        apply, params = fmeta.functionalize(net)
        algorithm, outer = fmeta.maml(loss(apply), fmeta.sgd(LR), steps=steps), fmeta.adam(1e-3)
        grads, _ = fmeta.meta_grad(algorithm)(params, batch)
        for name, g, other in zip(params, grads.values(), loop(net, params, batch, steps), strict=True):
            torch.testing.assert_close(g, other, rtol=2e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        state, step = fmeta.meta_init(algorithm, outer, params), fmeta.meta_step(algorithm, outer)
        ours = timed(
            lambda step=step, state=state, batch=batch: step(state, batch), 100 if steps == 1 else 20
        )
        peer = {name: p.clone() for name, p in params.items()}
        adam = torch.optim.Adam(peer.values(), 1e-3)
        run = lambda: loop_step(net, peer, batch, steps, adam)  # noqa: B023, E731
        theirs = timed(run, 20 if tasks * steps <= 100 else 3, burn_in=1)
        ratio = theirs["median"] / ours["median"]
        record("speed", {"tasks": tasks, "steps": steps}, {"fmeta": ours, "loop": theirs, "ratio": ratio})
        show = lambda t: f"{t['median']:.2f} ({t['min']:.2f} to {t['max']:.2f})"  # noqa: E731
        rows.append([tasks, steps, show(theirs), show(ours), f"{ratio:.0f}x"])
    print(
        f"One outer step in ms, median (range), {torch.get_num_threads()} CPU threads, sinusoid MLP 40-40\n"
    )
    print(table(["tasks", "inner steps", "loop on torch.autograd", "fmeta", "ratio"], rows))


if __name__ == "__main__":
    main()
