"""Pre-trained text encoders as embeddings: any encoder of ``transformers``, whole or parted at a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fmeta.weights.hub import pretrained

CALL = "encoder"
LENGTH = 10**0.5
"""Of embeddings at first: squared distances are then 20 (1 - cosine), as sentence encoders are trained with."""
Lower = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""``{"input_ids", "attention_mask"} -> {"hidden", "attention_mask"}``."""


def encoder(
    model: nn.Module | str | Path,
    *,
    pooling: Literal["mean", "cls"] = "mean",
    normalise: bool = True,
    ways: int | None = None,
) -> Encoder:
    """A pre-trained encoder that embeds texts: ``(input_ids, attention_mask) -> [n, dim]``.

    Its parameters are those of the model under ``model.*``; ``length``, the length of embeddings, with
    ``normalise``; and ``head.*`` with ``ways``. It is in evaluation mode (no dropout) and computes attention by the
    plain formula, which has second derivatives.

    Args:
        model: an encoder of ``transformers``, its name or path, or ``"minilm"``.
        pooling: what an embedding is made of: the mean over tokens, or the first token.
        normalise: whether embeddings get the same length, which is learned.
        ways: outputs of a linear head of zeros; None leaves the head out.

    Raises:
        ValueError: where there is no such model.
        NotImplementedError: for a model that is no text encoder, or whose attention takes no mask for each pair of
            tokens.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
        >>> embed = encoder(BertModel(tiny))
        >>> embed(torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5)).shape
        torch.Size([2, 4])
    """
    if pooling not in ("mean", "cls"):
        raise ValueError(f'{CALL}: pooling must be "mean" or "cls", got {pooling!r}.')
    if not isinstance(model, nn.Module):
        from transformers import AutoModel

        model = pretrained(CALL, AutoModel, model, attn_implementation="eager", dtype=torch.float32)
    own: Any = copy.deepcopy(model).eval()  # type: ignore[union-attr]
    if hasattr(own, "set_attn_implementation"):
        own.set_attn_implementation("eager")
    check_model(own)
    return Encoder(own, pooling, normalise, ways)


def check_model(model: Any) -> None:
    """Refuse what is no text encoder, and what reads the mask in another way than it is given here."""
    name = type(model).__name__
    embeds = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(embeds, nn.Embedding) or getattr(model.config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"{CALL}: a text encoder of transformers (AutoModel) was expected, got {name}. Give one with token "
            "embeddings and without a decoder, such as BERT."
        )
    length = min(160, getattr(model.config, "max_position_embeddings", 160) - 2)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(1, embeds.num_embeddings, (2, max(length, 2)), generator=random)
    ids = ids.to(embeds.weight.device)
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    try:
        with torch.no_grad():
            own = model(input_ids=ids, attention_mask=mask).last_hidden_state
            ours = model(input_ids=ids, attention_mask=additive(mask, own.dtype)).last_hidden_state
        same = torch.allclose(own[0], ours[0], atol=1e-4) and torch.allclose(
            own[1, : length // 2], ours[1, : length // 2], atol=1e-4
        )
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise NotImplementedError(
            f"{CALL}: {name} must take input_ids and attention_mask and return last_hidden_state, but {error}. "
            "Use another encoder."
        ) from error
    if not same:
        raise NotImplementedError(
            f"{CALL}: {name} must attend to all tokens of a text, but its outputs change with a mask for each pair "
            "of tokens (it looks at neighbours only, or at earlier tokens). Use an encoder with full attention."
        )


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention adds to its scores, ``[n, 1, length, length]``: a large negative number for padding.

    Models make it from ``[n, length]`` themselves, but look at values, which cannot be batched over tasks.
    """
    low = (1 - mask.to(dtype)) * torch.finfo(dtype).min
    return low[:, None, None, :].expand(-1, 1, mask.shape[-1], -1)


class Encoder(nn.Module):
    """What `encoder` returns. It takes ``hidden`` in place of ``input_ids`` once it is the upper part of one."""

    def __init__(self, model: nn.Module, pooling: str, normalise: bool, ways: int | None) -> None:
        """Around a model of transformers."""
        super().__init__()
        self.model, self.pooling = model, pooling
        like = next(model.parameters())
        self.dim: int = model.config.hidden_size  # type: ignore[union-attr, assignment]
        self.length = nn.Parameter(like.new_tensor(LENGTH)) if normalise else None
        self.head = headed(self.dim, ways).to(like)

    def forward(self, input_ids: Any = None, attention_mask: Any = None, hidden: Any = None) -> Tensor:
        """Embeddings ``[n, dim]`` of texts, or outputs ``[n, ways]``."""
        mask = attention_mask
        given = {"input_ids": input_ids} if hidden is None else {"inputs_embeds": hidden}
        dtype = next(self.model.parameters()).dtype
        found = self.model(**given, attention_mask=additive(mask, dtype)).last_hidden_state
        if self.pooling == "cls":
            embedded = found[:, 0]
        else:
            weight = mask[..., None].to(found.dtype)
            embedded = (found * weight).sum(1) / weight.sum(1).clamp(min=1)
        return self.head(scaled(embedded, self.length))


class Projection(nn.Module):
    """A linear map of features that are there already, at first the identity: ``[n, dim] -> [n, dim]`` or ways."""

    def __init__(self, dim: int, normalise: bool = True, ways: int | None = None) -> None:
        """On features of width ``dim``."""
        super().__init__()
        self.dim = dim
        self.map = nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.map.weight)
        self.length = nn.Parameter(torch.tensor(LENGTH)) if normalise else None
        self.head = headed(dim, ways)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.head(scaled(self.map(x), self.length))


def headed(dim: int, ways: int | None) -> nn.Module:
    """A head of zeros, or none."""
    if ways is None:
        return nn.Identity()
    head = nn.Linear(dim, ways)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def scaled(x: Tensor, length: Tensor | None) -> Tensor:
    """Rows of one length; as they are for None."""
    if length is None:
        return x
    return x * (length * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-12))


def with_ways(encoder: Encoder, ways: int | None) -> Encoder:
    """A copy of an encoder with another head."""
    copied = copy.deepcopy(encoder)
    copied.head = headed(copied.dim, ways).to(next(copied.model.parameters()))
    return copied
