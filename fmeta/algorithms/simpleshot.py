"""SimpleShot: nearest class mean on features that are centred and of length one. Nothing is meta-learned for it.

``u(x) = (embed(x) - mean) / |embed(x) - mean|``, scores ``-|u(x) - mean_c u|^2``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fmeta.adapt import weights_as_meta
from fmeta.functional import check_apply
from fmeta.losses import outputs
from fmeta.metric import class_means, fitted, unit
from fmeta.types import Algorithm, Batch, Params, Tree


def simpleshot(
    apply: Callable[..., Tensor],
    *,
    mean: Tensor | None = None,
    normalise: bool = True,
    ways: int | None = None,
) -> Algorithm:
    """Nearest centroid on the features of a network that was trained in any way. Its meta is ``Params``.

    The baseline that a meta-learned model of the same backbone has to beat.

    **Meta-gradient:** there is one, as for ``protonet``; the paper never trains by it.
    **Cost:** one pass of the embedding over support and query.

    Args:
        apply: the embedding, ``(params, x) -> [n, dim]``, as ``functionalize`` returns it.
        mean: ``[dim]``, the mean feature of the training classes (the paper's CL2N); None leaves it out (L2N).
        normalise: whether features get length one; False with no mean is the plain nearest centroid (UN).
        ways: see ``protonet``.

    References:
        Wang, Chao, Weinberger, van der Maaten, "SimpleShot: revisiting nearest-neighbor classification for
        few-shot learning", 2019, arXiv 1911.04623, sections 2 and 3.
    """
    check_apply("simpleshot", apply)

    def features(meta: Params, x: Tree) -> Tensor:
        embedded = outputs(apply, meta, x)
        centred = embedded if mean is None else embedded - mean
        return unit(centred) if normalise else centred

    def fit(meta: Params, support: Batch, member: Tensor) -> dict[str, Tensor]:
        return {"centroids": class_means(features(meta, support.x), member)}

    def score(params: dict[str, Tensor], meta: Params, x: Tree) -> Tensor:
        return -(features(meta, x)[:, None] - params["centroids"][None]).square().sum(-1)

    return fitted("simpleshot", weights_as_meta("simpleshot"), fit, score, ways=ways)
