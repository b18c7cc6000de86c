"""Classes out of unlabelled pictures: clusters, tasks from several partitions, embeddings."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import sklearn.cluster
import torch
from tiny_runs import random_pictures
from torch import Tensor

import fmeta
from fmeta import Plan
from fmeta.data import Pool, cactus, class_pool
from fmeta.embeddings import pca, prototransfer
from fmeta.tasks import few_shot, mixture

POOL = random_pictures().train  # 12 classes of 6
EAGER = Plan(compile=False)


def flat(x: Tensor) -> Tensor:
    return x.flatten(1)


def members(pool: Pool) -> list[list[int]]:
    """Rows of the pool's examples by class."""
    return [pool.rows[c, :n].tolist() for c, n in enumerate(pool.counts.tolist())]


# Clusters


def test_clusters_of_pictures_that_differ_by_noise_are_their_classes() -> None:
    (found,) = cactus(POOL, flat, clusters=12)
    truth = [frozenset(rows) for rows in members(POOL)]
    assert sorted(map(sorted, members(found))) == sorted(map(sorted, truth))
    assert found.x is POOL.x and found.names[0].startswith("cluster")
    for number, rows in enumerate(members(found)):
        assert (found.y[rows] == number).all()


def test_labels_are_not_read() -> None:
    mixed = class_pool(POOL.x, POOL.y.roll(1), POOL.names)
    for one, other in zip(cactus(POOL, flat, clusters=5), cactus(mixed, flat, clusters=5), strict=True):
        assert torch.equal(one.y, other.y)


def test_small_clusters_are_dropped() -> None:
    """One class of two, the rest of six: no task of it can be had with three examples."""
    keep = torch.cat([torch.arange(4), torch.arange(6, 72)])
    loose = class_pool(POOL.x[keep], POOL.y[keep], POOL.names)
    (found,) = cactus(loose, flat, clusters=12, smallest=5)
    assert found.counts.tolist() == [6] * 11 and len(found.names) == 11
    assert (found.y[:4] == -1).all() and (found.y[4:] >= 0).all()
    task = few_shot(found, ways=11, shots=2, queries=4, tasks=3)(0, 0)
    known = loose.x[:4].flatten(1)
    assert not (task.query.x.flatten(0, 1).flatten(1)[:, None] == known).all(-1).any()


def test_partitions_are_of_the_embedding_and_of_random_stretches_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[tuple[Tensor, int]] = []

    class Watched(sklearn.cluster.KMeans):
        def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
            given.append((torch.from_numpy(X.copy()), self.n_init))
            return super().fit_predict(X)

    monkeypatch.setattr(sklearn.cluster, "KMeans", Watched)
    embed = pca(POOL, 6)
    found = cactus(POOL, embed, clusters=5, partitions=3)
    cactus(POOL, embed, clusters=5)
    plain = embed(POOL.x)
    assert torch.allclose(given[0][0], plain, atol=1e-5) and torch.allclose(given[3][0], plain, atol=1e-5)
    assert [starts for _, starts in given] == [1, 1, 1, 10]
    factors = [stretched / plain for stretched, _ in given[1:3]]
    for factor in factors:
        assert factor.std(0).max() < 1e-3 and 0 < factor.min() and factor.max() < 1
    assert (factors[0].mean(0) - factors[1].mean(0)).abs().max() > 0.1
    together = lambda pool: pool.y[:, None] == pool.y  # noqa: E731
    for a, b in pairwise(found):
        assert not torch.equal(together(a), together(b))


def test_it_is_a_function_of_its_seed() -> None:
    first, again, other = (
        torch.stack([p.y for p in cactus(POOL, pca(POOL, 6), clusters=5, partitions=2, seed=seed)])
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_an_embedding_sees_batches_in_random_order_without_gradients() -> None:
    seen: list[Tensor] = []
    many = class_pool(torch.arange(1200).to(torch.uint8)[:, None], torch.arange(1200) % 3, ("a", "b", "c"))
    numbered = replace(many, x=torch.arange(1200.0)[:, None])

    def embed(x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled() and x.dtype == torch.float32
        seen.append(x)
        return x

    (found,) = cactus(numbered, embed, clusters=2)
    assert [len(x) for x in seen] == [500, 500, 200]
    assert torch.cat(seen).flatten().sort().values.tolist() == list(range(1200))
    assert (seen[0].flatten().diff() > 0).float().mean() < 0.7
    assert len(found.y.unique_consecutive()) == 2  # rows go back to where they came from
    cactus(many, lambda x: embed(x) if x.max() <= 1 else x[:0], clusters=2)  # bytes come as 0 .. 1


@pytest.mark.parametrize(
    ("embed", "options", "error", "said"),
    [
        (flat, {"clusters": 0}, ValueError, "clusters must be a positive int, got 0"),
        (flat, {"partitions": 1.0}, ValueError, "partitions must be a positive int, got 1.0"),
        (flat, {"smallest": True}, ValueError, "smallest must be a positive int, got True"),
        (flat, {"clusters": 73}, ValueError, "clusters must be at most the 72 examples, got 73"),
        (flat, {"clusters": 3, "smallest": 70}, ValueError, "some cluster must have smallest=70 members"),
        (lambda x: x, {"clusters": 3}, ValueError, r"embed must return one row an example.*got \[72, 1, 16, 16\]"),
        (lambda x: 3, {"clusters": 3}, ValueError, "embed must return one row an example.*got int"),
        (lambda x: flat(x)[:5], {"clusters": 3}, ValueError, r".*one row an example, \[72, dim\], got \[5, 256\]"),
        (lambda x: flat(x) / 0, {"clusters": 3}, ValueError, "embeddings must be finite"),
    ],
)  # fmt: skip
def test_what_cannot_be_clustered_is_refused(
    embed: Callable[[Tensor], Any], options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=f"cactus: {said}"):
        cactus(POOL, embed, **options)


def test_a_pool_and_scikit_learn_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="cactus: pool must be a Pool, got Tensor"):
        cactus(POOL.x, flat)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match=r"cactus: scikit-learn must be installed.*fmeta\[unsupervised\]"):
        cactus(POOL, flat, clusters=3)


def test_maml_trains_on_clusters() -> None:
    pools = cactus(POOL, pca(POOL, 11), clusters=12, partitions=2, smallest=3)
    parts = [few_shot(pool, ways=3, shots=1, queries=2, tasks=1) for pool in pools]
    tasks = mixture(parts, tasks=8)
    torch.manual_seed(0)
    apply, params = fmeta.functionalize(fmeta.models.mlp([256, 32, 3]))
    algorithm = fmeta.maml(fmeta.losses.cross_entropy(apply), fmeta.sgd(0.1), steps=2)
    outer = fmeta.adam(1e-2)
    state, step = fmeta.meta_init(algorithm, outer, params), fmeta.meta_step(algorithm, outer, EAGER)
    losses = []
    for index in range(40):
        state, metrics = step(state, tasks(0, index))
        losses.append(float(metrics["loss"]))
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


# Tasks from several pools


def numbered(number: float, tasks: int = 1) -> fmeta.types.Sampler:
    """Tasks that say which sampler, seed and step they are of."""

    def sample(seed: int, step: int) -> fmeta.Task:
        x = torch.tensor([number, seed, step]).expand(tasks, 2, 3)
        return fmeta.Task(fmeta.Batch(x, x[..., 0]), fmeta.Batch(x[:, :1], x[:, :1, 0]))

    return sample


def test_every_task_of_a_mixture_has_a_sampler_of_its_own() -> None:
    sampler = mixture([numbered(0), numbered(1), numbered(2)], tasks=50)
    drawn = [sampler(7, step).support.x[:, 0] for step in range(40)]
    rows = torch.cat(drawn)
    assert rows.shape == (2000, 3) and (rows[:, 1] == 7).all()
    assert rows[:, 2].tolist() == list(range(2000))  # no draw comes twice
    share = torch.bincount(rows[:, 0].long()) / len(rows)
    assert (share - 1 / 3).abs().max() < 0.05
    assert torch.equal(sampler(7, 3).query.y, sampler(7, 3).query.y)
    assert not torch.equal(drawn[0][:, 0], drawn[1][:, 0])


def test_a_sampler_may_fill_more_than_one_place() -> None:
    assert mixture([numbered(0, tasks=3)], tasks=2)(0, 0).support.x.shape == (6, 2, 3)


def test_a_mixture_needs_samplers_of_one_shape() -> None:
    with pytest.raises(TypeError, match=r"mixture: samplers must be functions .* got \[\]"):
        mixture([], tasks=1)
    with pytest.raises(TypeError, match=r"mixture: samplers must be functions .* got \['Pool'\]"):
        mixture([POOL], tasks=1)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="mixture: tasks must be a positive int, got 0"):
        mixture([numbered(0)], tasks=0)
    one, two = (few_shot(POOL, ways=ways, shots=1, queries=1, tasks=1) for ways in (2, 3))
    with pytest.raises(ValueError, match="mixture: samplers must give tasks of one shape, got 2 shapes"):
        mixture([one, two], tasks=20)(0, 0)


# Embeddings


def test_principal_components_are_those_of_the_singular_value_decomposition() -> None:
    x = POOL.x.flatten(1)
    centred = x - x.mean(0)
    _, values, axes = torch.linalg.svd(centred, full_matrices=False)
    got = pca(POOL, 5)(POOL.x)
    want = centred @ axes[:5].mT
    assert torch.allclose(got.abs(), want.abs(), atol=1e-4)
    assert torch.allclose(got.square().mean(0), values[:5] ** 2 / len(x), rtol=1e-3)
    white = pca(POOL, 5, whiten=True)(POOL.x)
    assert torch.allclose(white.mT @ white / len(x), torch.eye(5), atol=1e-3)
    with pytest.raises(
        ValueError, match="pca: dim must be at most 72 for 72 examples of 256 numbers, got 73"
    ):
        pca(POOL, 73)
    with pytest.raises(ValueError, match="pca: dim must be a positive int, got 0"):
        pca(POOL, 0)


def agreement(embed: Callable[[Tensor], Tensor], copies: Tensor) -> float:
    """How often the picture nearest to a changed copy is the one that it was made from."""
    near = torch.cdist(embed(copies), embed(POOL.x)).argmin(1)
    return float((near == torch.arange(len(near))).float().mean())


def test_a_learned_embedding_knows_a_picture_by_its_copy() -> None:
    def noisy(x: Tensor, random: torch.Generator) -> Tensor:
        return x + 0.3 * torch.randn(x.shape, generator=random)

    def module() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 8))

    apply, params = fmeta.functionalize(module())
    copies = noisy(POOL.x, torch.Generator().manual_seed(9))
    options: dict[str, Any] = dict(ways=24, augment=noisy, lr=1e-2, plan=EAGER)
    learned = prototransfer(POOL, module=module(), steps=150, **options)
    assert learned(POOL.x).shape == (72, 8)
    assert agreement(learned, copies) > agreement(lambda x: apply(params, x), copies) + 0.1


def test_the_default_embedding_is_a_function_of_its_seed() -> None:
    before = torch.get_rng_state()
    first, again, other = (
        prototransfer(POOL, steps=1, ways=4, seed=seed, plan=EAGER)(POOL.x) for seed in (1, 1, 2)
    )
    assert first.shape == (72, 64) and torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="prototransfer: steps must be a positive int, got 0"):
        prototransfer(POOL, steps=0)
