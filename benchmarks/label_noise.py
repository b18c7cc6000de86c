"""Weights of examples under wrong labels, learned by hypergradients: `python -m benchmarks.label_noise`.

A network of one hidden layer learns 10 classes of scikit-learn's digits, of which a part of the training labels
is wrong (drawn anew, uniformly); 30 pictures with right labels steer it. Beside plain training: Meta-Weight-Net
(Shu et al., 2019, arXiv 1902.07379), in which a network of one hidden layer gives every example a weight by its
loss; learning to reweight (Ren et al., 2018, arXiv 1803.09050), in which the weights of a batch are one
hypergradient, cut at zero; and plain training on the right labels alone. All hypergradients are
`fmeta.hypergrad` through one step.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fmeta
from fmeta import tree


class Data(NamedTuple):
    """Training pictures with labels of which some are wrong, a few right ones, and a test set."""

    train: fmeta.Batch
    clean: fmeta.Batch
    test: fmeta.Batch
    wrong: Tensor


def load(noise: float, seed: int) -> Data:
    from sklearn.datasets import load_digits

    digits = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits.target), generator=generator)
    x, y = torch.from_numpy(digits.images).float()[order] / 16, torch.from_numpy(digits.target)[order]
    drawn = torch.randint(0, 10, y.shape, generator=generator)
    wrong = torch.rand(y.shape, generator=generator) < noise
    noisy = torch.where(wrong, drawn, y)
    part = lambda a, b, labels: fmeta.Batch(x[a:b], labels[a:b])  # noqa: E731
    return Data(
        part(CLEAN, 1000 + CLEAN, noisy),
        part(0, CLEAN, y),
        part(1000 + CLEAN, None, y),
        (noisy != y)[CLEAN : 1000 + CLEAN],
    )


CLEAN = 100
"""Pictures with right labels that steer training."""
META_LR = 1e-3
"""Of the weight network, the paper's."""


def network() -> nn.Module:
    return fmeta.models.mlp([64, 128, 10])


def weigher() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())


apply, weigh = fmeta.functionalize(network())[0], fmeta.functionalize(weigher())[0]


def losses(params: Any, batch: fmeta.Batch) -> Tensor:
    """The loss of every example, ``[n]``."""
    logits = apply(params, batch.x)
    return logits.logsumexp(1) - logits.gather(1, batch.y[:, None])[:, 0]


def meta_weight_net(params: Any, hyper: Any, batch: fmeta.Batch) -> Tensor:
    each = losses(params, batch)
    weights = weigh(hyper, each.detach()[:, None])[:, 0]
    return (weights * each).sum() / weights.sum().clamp(min=1e-6)


def by_weights(params: Any, hyper: Tensor, batch: fmeta.Batch) -> Tensor:
    return (hyper * losses(params, batch)).sum()


def judged(params: Any, hyper: Any, batch: fmeta.Batch) -> Tensor:
    return losses(params, batch).mean()


def train(method: str, data: Data, steps: int, seed: int, lr: float = 0.1) -> float:
    """Test accuracy of the last network, in per cent."""
    torch.manual_seed(seed)
    params, hyper = fmeta.functionalize(network())[1], fmeta.functionalize(weigher())[1]
    rule = fmeta.sgd(lr, momentum=0.9)
    look = fmeta.sgd(lr)  # the step that a hypergradient looks ahead, without momentum
    state, outer = rule.init(params), fmeta.adam(META_LR)
    outer_state = outer.init(hyper)
    nets = fmeta.hypergrad(meta_weight_net, judged, look, steps=1)
    reweights = fmeta.hypergrad(by_weights, judged, look, steps=1)
    for _ in range(steps):
        rows = torch.randint(0, len(data.train.y), (100,))
        if method == "right labels only":
            kept = (~data.wrong).nonzero()[:, 0]
            rows = kept[torch.randint(0, len(kept), (100,))]
        batch = fmeta.Batch(data.train.x[rows], data.train.y[rows])
        task = fmeta.Task(batch, data.clean)
        loss: Any = lambda p, batch=batch: losses(p, batch).mean()  # noqa: E731
        if method == "Meta-Weight-Net":
            grads, _ = nets(params, hyper, task)
            updates, outer_state = outer.update(grads, outer_state, hyper)
            hyper = tree.add(hyper, updates)
            loss = lambda p, h=hyper, batch=batch: meta_weight_net(p, h, batch)  # noqa: E731
        elif method == "learning to reweight":
            slope, _ = reweights(params, torch.zeros(len(rows)), task)
            weights = (-slope).clamp(min=0)
            weights = weights / weights.sum().clamp(min=1e-12)
            loss = lambda p, w=weights, batch=batch: by_weights(p, w, batch)  # noqa: E731
        updates, state = rule.update(torch.func.grad(loss)(params), state, params)
        params = tree.add(params, updates)
    return 100 * (apply(params, data.test.x).argmax(1) == data.test.y).float().mean().item()


METHODS = ("plain", "learning to reweight", "Meta-Weight-Net", "right labels only")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.4, 0.6])
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {"steps": options.steps, "seeds": options.seeds, "accuracy": {}}
    for noise in options.noise:
        found = {
            method: [train(method, load(noise, seed), options.steps, seed) for seed in range(options.seeds)]
            for method in METHODS
        }
        print(
            f"\n{noise:.0%} of the labels drawn anew: test accuracy, %, {options.seeds} seeds; minus plain, paired"
        )
        for method, values in found.items():
            gain = [a - b for a, b in zip(values, found["plain"], strict=True)]
            spread = lambda v: 1.96 * statistics.stdev(v) / math.sqrt(len(v)) if len(v) > 1 else math.nan  # noqa: E731
            print(
                f"  {method:<22} {statistics.fmean(values):5.1f} ± {spread(values):.1f}"
                f"   {statistics.fmean(gain):+.1f} ± {spread(gain):.1f}"
            )
        record["accuracy"][str(noise)] = found
    if options.out:
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
