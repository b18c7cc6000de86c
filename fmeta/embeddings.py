"""Embeddings of unlabelled pictures, for ``fmeta.data.cactus``: principal components, and one that is learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmeta.algorithms import protonet
from fmeta.data.cactus import Embed
from fmeta.data.pool import Pool
from fmeta.functional import functionalize
from fmeta.meta import meta_init, meta_step
from fmeta.models import conv4
from fmeta.optim import adam
from fmeta.schedules import cosine
from fmeta.tasks import umtra
from fmeta.tasks.checks import check_counts
from fmeta.tasks.few_shot import Augment
from fmeta.types import Plan


def pca(pool: Pool, dim: int = 64, *, whiten: bool = False) -> Embed:
    """Coordinates along the ``dim`` principal components of a pool's examples, flattened.

    Args:
        pool: at least ``dim`` examples of at least ``dim`` numbers; bytes count as 0 .. 1.
        dim: components, the largest first.
        whiten: whether coordinates are scaled to variance 1.

    Returns:
        ``x -> [n, dim]``.

    >>> from fmeta.data import class_pool
    >>> x = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> pca(class_pool(x, torch.zeros(4).long(), ("all",)), 1)(x).abs().flatten().tolist()
    [2.0, 2.0, 0.0, 0.0]
    """
    check_counts("pca", dim=dim)
    x = flat(pool.x)
    if dim > min(x.shape):
        raise ValueError(
            f"pca: dim must be at most {min(x.shape)} for {len(x)} examples of {x.shape[1]} numbers, got {dim}. "
            "Ask for fewer components."
        )
    mean = x.mean(0)
    centred = x - mean
    variances, axes = torch.linalg.eigh(centred.mT @ centred / len(x))  # in rising order
    axes = axes[:, -dim:].flip(1)
    if whiten:
        axes = axes * torch.rsqrt(variances[-dim:].flip(0).clamp(min=1e-12))
    return lambda x: (flat(x).to(mean) - mean) @ axes


def prototransfer(
    pool: Pool,
    *,
    module: nn.Module | None = None,
    steps: int = 2000,
    ways: int = 50,
    queries: int = 3,
    augment: Augment | str = "affine",
    lr: float = 1e-3,
    seed: int = 0,
    plan: Plan = Plan(),
) -> Embed:
    """Learn an embedding in which a picture is close to its own changed copies and far from other pictures.

    A prototypical network on tasks without labels: ``protonet`` on ``umtra``, one task of ``ways`` pictures a step,
    each picture the prototype of its ``queries`` changed copies.

    **Cost:** ``steps`` gradients of the embedding on ``ways * (1 + queries)`` pictures.

    Args:
        pool: the unlabelled pictures, such as ``omniglot(root).train``.
        module: the embedding, ``[n, C, H, W] -> [n, dim]``; the default is ``conv4`` of 64 filters, 64 numbers.
        steps: outer steps of Adam, whose rate falls as a cosine.
        ways: pictures a step, the paper's 50.
        queries: copies of each, the paper's 3.
        augment: what changes them, as ``umtra`` takes it: it decides what the embedding does not see.
        lr: Adam's first rate, the paper's.
        seed: of the tasks and of the default module's weights.
        plan: how it is run.

    Returns:
        ``x -> [n, dim]``; batch norm in the module uses the batch that it is called with.

    References:
        Medina, Devos, Grossglauser, "Self-supervised prototypical transfer learning for few-shot classification",
        2020, arXiv 2006.11325, algorithm 1 (ProtoCLR). Deviations: a cosine in place of halving the rate; its other
        augmentations are the caller's to bring.
    """
    check_counts("prototransfer", steps=steps)
    sampler = umtra(pool, ways=ways, tasks=1, queries=queries, augment=augment)
    if module is None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = conv4(pool.x.shape[1], ways=None).to(pool.x.device)
    apply, params = functionalize(module)
    algorithm, outer = protonet(apply, ways=ways), adam(cosine(lr, steps))
    state, step = meta_init(algorithm, outer, params), meta_step(algorithm, outer, plan)
    for index in range(steps):
        state, _ = step(state, sampler(seed, index))
    return lambda x: apply(state.meta, x)


def flat(x: Tensor) -> Tensor:
    """One row of floats an example; bytes become 0 .. 1."""
    return (x.float() / 255 if x.dtype == torch.uint8 else x).flatten(1)
