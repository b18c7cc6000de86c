"""CACTUs: classes out of unlabelled examples, by clustering an embedding of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmeta.data.pool import Pool, class_pool

CALL = "cactus"
Embed = Callable[[Tensor], Tensor]
"""``[n, *feature] -> [n, dim]``; bytes come as float32 in 0 .. 1."""
BATCH = 500


def cactus(
    pool: Pool,
    embed: Embed,
    *,
    clusters: int = 500,
    partitions: int = 1,
    smallest: int = 2,
    seed: int = 0,
) -> tuple[Pool, ...]:
    """Partition a pool's examples into clusters of their embeddings by k-means. Labels are not read.

    The first partition is of the embedding itself; each further one is of an embedding whose dimensions are
    stretched by random factors in 0 .. 1, so that other features count. Sample tasks with ``few_shot`` from one
    pool, or with ``mixture`` from several.

    Args:
        pool: the unlabelled examples, such as ``omniglot(root).train``.
        embed: ``x -> [n, dim]``, called without gradients on batches of 500 examples in random order; ready ones are
            in ``fmeta.embeddings``. Distances in it decide what a class is.
        clusters: of a partition; the paper's 500.
        partitions: how many; the paper has 50 for miniImageNet, and one for Omniglot in its code.
        smallest: members that a cluster needs to become a class: ``shots + queries`` of the tasks to come.
        seed: of the factors, and of where k-means starts.

    Returns:
        A pool for each partition. All share the examples of ``pool``; ``y`` is -1 for those of clusters that were
        too small, which no task has.

    Raises:
        ImportError: without scikit-learn.
        ValueError: for counts below 1, fewer examples than clusters, an embedding of a wrong shape or that is not
            finite, or no cluster that is large enough.

    References:
        Hsu, Levine, Finn, "Unsupervised learning via meta-learning", 2019, arXiv 1810.02334, algorithm 1 and section
        2.3. As in its code, k-means starts 10 times for a single partition and once for each of several.
        Deviation: the paper's embeddings (ACAI, BiGAN, DeepCluster) are the caller's to bring.
    """
    for name, count in (("clusters", clusters), ("partitions", partitions), ("smallest", smallest)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{CALL}: {name} must be a positive int, got {count!r}. Pass 1 or more.")
    if not isinstance(pool, Pool):
        raise TypeError(
            f"{CALL}: pool must be a Pool, got {type(pool).__name__}. Pass pools.train, for example."
        )
    if clusters > len(pool.x):
        raise ValueError(
            f"{CALL}: clusters must be at most the {len(pool.x)} examples, got {clusters}. Ask for fewer."
        )
    k_means = _k_means_of_scikit_learn()
    random = torch.Generator().manual_seed(seed)
    embedded = _embedded(pool.x, embed, random)
    found = []
    for partition in range(partitions):
        stretch = (
            torch.rand(embedded.shape[1], generator=random) if partition else torch.ones(embedded.shape[1])
        )
        model = k_means(
            clusters, n_init=10 if partitions == 1 else 1, random_state=(seed + partition) % 2**32
        )
        labels = torch.from_numpy(model.fit_predict((embedded * stretch).numpy())).long()
        found.append(_classes(pool, labels, clusters, smallest))
    return tuple(found)


def _k_means_of_scikit_learn() -> Any:
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError(
            f"{CALL}: scikit-learn must be installed for k-means, got {error}. Run "
            "`pip install 'fmeta[unsupervised]'`, or `pip install scikit-learn`."
        ) from error
    return KMeans


def _embedded(x: Tensor, embed: Embed, random: torch.Generator) -> Tensor:
    """Embeddings of all examples, on the CPU. In random order, for batch norm sees a batch as a whole."""
    order, rows = torch.randperm(len(x), generator=random), []
    with torch.no_grad():
        for part in order.split(BATCH):
            batch = x[part.to(x.device)]
            out = embed(batch.float() / 255 if batch.dtype == torch.uint8 else batch)
            if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(part):
                got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
                raise ValueError(
                    f"{CALL}: embed must return one row an example, [{len(part)}, dim], got {got}. "
                    "Flatten what it returns, with .flatten(1) for example."
                )
            rows.append(out.float().cpu())
    embedded = torch.empty(len(x), rows[0].shape[1])
    embedded[order] = torch.cat(rows)
    if not embedded.isfinite().all():
        raise ValueError(
            f"{CALL}: embeddings must be finite, got some that are not. Look at what embed returns."
        )
    return embedded


def _classes(pool: Pool, labels: Tensor, clusters: int, smallest: int) -> Pool:
    """The pool of the clusters that are large enough, numbered anew."""
    kept = (torch.bincount(labels, minlength=clusters) >= smallest).nonzero().flatten()
    if not len(kept):
        raise ValueError(
            f"{CALL}: some cluster must have smallest={smallest} members, but none has. Ask for fewer clusters."
        )
    number = torch.full((clusters,), -1)
    number[kept] = torch.arange(len(kept))
    y = number[labels]
    used = (y >= 0).nonzero().flatten()
    names = tuple(f"cluster {index}" for index in kept.tolist())
    inner = class_pool(torch.zeros(len(used)), y[used], names)  # its rows are places in ``used``
    return Pool(pool.x, y.to(pool.y.device), names, used[inner.rows], inner.counts)
