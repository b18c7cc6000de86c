"""Every class of torch.nn, as a layer between a linear layer and a loss, or with the reason why it cannot be.

``LAYERS`` is what must work in every engine, ``RANDOM`` what needs a mode of randomness, ``REFUSED`` what
raises, with the text of the error, ``NOT_LAYERS`` what has no forward of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SHOTS = 4


class LayerCase(NamedTuple):
    """A layer, how to make it, and the shape of the examples that it takes, shots first."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


class Call(nn.Module):
    """A layer that is not simply called with one tensor: ``call(layer, x)`` says how."""

    def __init__(self, layer: nn.Module, call: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.layer = layer
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.call(self.layer, x)


class Net(nn.Module):
    """Linear, the layer, and the mean of a smooth function of all its floating outputs."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.first = nn.Linear(shape[-1], shape[-1])
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        outputs = torch.utils._pytree.tree_leaves(self.layer(self.first(x)))
        return sum(
            (torch.sin(2 * out) + out * out).mean()
            for out in outputs
            if out is not None and out.is_floating_point()
        )


def ids(x: Tensor, classes: int) -> Tensor:
    """Integers that differ from task to task and carry no gradient."""
    return x.detach().argsort(-1) % classes


def target(x: Tensor) -> Tensor:
    """A floating target of the same shape that depends on nothing, but has a task axis where x has one."""
    return torch.linspace(0.1, 0.9, x.numel()).view(x.shape) + 0 * x.detach()


SEQUENCE, IMAGE, VOLUME = (SHOTS, 6, 5), (SHOTS, 4, 6, 6), (2, 2, 4, 4, 4)
ROW = (SHOTS, 6)
PAD = {1: (1, 2), 2: (1, 2, 1, 2), 3: (1, 2, 1, 2, 1, 2)}
SHAPES = {1: SEQUENCE, 2: IMAGE, 3: VOLUME}


def activations() -> list[LayerCase]:
    plain = (
        "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU ReLU ReLU6 "
        "SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink Identity Flatten"
    )
    cases = [LayerCase(name, getattr(nn, name), ROW) for name in plain.split()]
    cases += [
        LayerCase(name, lambda name=name: getattr(nn, name)(-1), ROW)
        for name in ("Softmax", "LogSoftmax", "Softmin", "GLU")
    ]
    return [
        *cases,
        LayerCase("GELU tanh", lambda: nn.GELU("tanh"), ROW),
        LayerCase("RReLU eval", lambda: nn.RReLU().eval(), ROW),
        LayerCase("Softmax2d", nn.Softmax2d, IMAGE),
        LayerCase("Threshold", lambda: nn.Threshold(0.1, -0.2), ROW),
        LayerCase("Unflatten", lambda: nn.Unflatten(1, (2, 3)), ROW),
    ]


def bag(**options: Any) -> nn.Module:
    """Bags of two of six embeddings, or of one where a member is the padding."""
    return Call(nn.EmbeddingBag(6, 6, **options), lambda m, x: m(ids(x, 6)[:, :2]) * x)


def linear() -> list[LayerCase]:
    return [
        LayerCase("EmbeddingBag", bag, ROW),
        LayerCase("EmbeddingBag sum", lambda: bag(mode="sum", padding_idx=0), ROW),
        LayerCase("EmbeddingBag padding", lambda: bag(padding_idx=-1), ROW),
        LayerCase("Linear", lambda: nn.Linear(6, 3), ROW),
        LayerCase("LazyLinear", lambda: initialised(nn.LazyLinear(3), ROW), ROW),
        LayerCase("Bilinear", lambda: Call(nn.Bilinear(6, 6, 3), lambda m, x: m(x, x.flip(0))), ROW),
        LayerCase(
            "Embedding", lambda: Call(nn.Embedding(5, 6), lambda m, x: m(ids(x, 5)) * x[..., None]), ROW
        ),
        LayerCase("Sequential", lambda: nn.Sequential(nn.Linear(6, 3), nn.Tanh()), ROW),
        LayerCase("ModuleList", lambda: Call(nn.ModuleList([nn.Linear(6, 3)]), lambda m, x: m[0](x)), ROW),
        LayerCase(
            "ModuleDict", lambda: Call(nn.ModuleDict({"a": nn.Linear(6, 3)}), lambda m, x: m["a"](x)), ROW
        ),
        LayerCase(
            "ParameterList", lambda: Call(nn.ParameterList([torch.ones(6)]), lambda m, x: m[0] * x), ROW
        ),
        LayerCase(
            "ParameterDict",
            lambda: Call(nn.ParameterDict({"a": torch.ones(6)}), lambda m, x: m["a"] * x),
            ROW,
        ),
        LayerCase("weight_norm", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)), ROW),
        LayerCase("orthogonal", lambda: nn.utils.parametrizations.orthogonal(nn.Linear(6, 6)), ROW),
        LayerCase(
            "spectral_norm eval", lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3)).eval(), ROW
        ),
    ]


def initialised(layer: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    layer(torch.randn(shape))
    return layer


def convolutions() -> list[LayerCase]:
    cases = []
    for n, shape in SHAPES.items():
        c = shape[1]
        for name in (f"Conv{n}d", f"ConvTranspose{n}d"):
            layer, lazy = getattr(nn, name), getattr(nn, f"Lazy{name}")
            cases += [
                LayerCase(name, lambda layer=layer, c=c: layer(c, 3, 3, padding=1, stride=2), shape),
                LayerCase(
                    f"{name} groups", lambda layer=layer, c=c: layer(c, c, 2, dilation=2, groups=2), shape
                ),
                LayerCase(
                    f"Lazy{name}", lambda lazy=lazy, shape=shape: initialised(lazy(3, 2), shape), shape
                ),
            ]
        for name in ("Constant", "Zero", "Reflection", "Replication", "Circular"):
            layer, args = getattr(nn, f"{name}Pad{n}d"), (PAD[n], 0.3)[: 1 + (name == "Constant")]
            cases.append(LayerCase(f"{name}Pad{n}d", lambda layer=layer, args=args: layer(*args), shape))
    return [
        *cases,
        LayerCase("Fold", lambda: nn.Fold((3, 4), 2), (SHOTS, 8, 6)),
        LayerCase("Unfold", lambda: nn.Unfold(2, padding=1), IMAGE),
        LayerCase("PixelShuffle", lambda: nn.PixelShuffle(2), IMAGE),
        LayerCase("PixelUnshuffle", lambda: nn.PixelUnshuffle(2), IMAGE),
        LayerCase("ChannelShuffle", lambda: nn.ChannelShuffle(2), IMAGE),
        LayerCase("Upsample bilinear", lambda: nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE),
        LayerCase("Upsample bicubic", lambda: nn.Upsample(scale_factor=2, mode="bicubic"), IMAGE),
        LayerCase("Upsample nearest", lambda: nn.Upsample(scale_factor=2), IMAGE),
        LayerCase("UpsamplingBilinear2d", lambda: nn.UpsamplingBilinear2d(scale_factor=2), IMAGE),
        LayerCase("UpsamplingNearest2d", lambda: nn.UpsamplingNearest2d(scale_factor=2), IMAGE),
    ]


def pools() -> list[LayerCase]:
    cases = []
    for n, shape in SHAPES.items():
        for name in ("MaxPool", "AvgPool"):
            cases.append(
                LayerCase(f"{name}{n}d", lambda name=name, n=n: getattr(nn, f"{name}{n}d")(2), shape)
            )
        for name in ("AdaptiveAvgPool", "AdaptiveMaxPool"):
            cases.append(
                LayerCase(f"{name}{n}d", lambda name=name, n=n: getattr(nn, f"{name}{n}d")(2), shape)
            )
        cases.append(
            LayerCase(
                f"LPPool{n}d",
                lambda n=n: Call(getattr(nn, f"LPPool{n}d")(2, 2), lambda m, x: m(x + 9)),
                shape,
            )
        )
        cases.append(LayerCase(f"MaxUnpool{n}d", lambda n=n: unpool(n), shape))
    places = lambda *shape: torch.linspace(0.1, 0.9, math.prod(shape), dtype=torch.float64).view(shape)  # noqa: E731
    return [
        *cases,
        LayerCase(
            "FractionalMaxPool2d",
            lambda: nn.FractionalMaxPool2d(2, 3, _random_samples=places(4, 4, 2)),
            IMAGE,
        ),
        LayerCase(
            "FractionalMaxPool3d",
            lambda: nn.FractionalMaxPool3d(2, 2, _random_samples=places(2, 2, 3)),
            VOLUME,
        ),
    ]


def unpool(n: int) -> nn.Module:
    pool = getattr(nn, f"MaxPool{n}d")(2, return_indices=True)
    return Call(getattr(nn, f"MaxUnpool{n}d")(2), lambda m, x: m(*pool(x)))


def norms() -> list[LayerCase]:
    cases = [
        LayerCase("LayerNorm", lambda: nn.LayerNorm(6), ROW),
        LayerCase("LayerNorm plain", lambda: nn.LayerNorm((6, 5), elementwise_affine=False), SEQUENCE),
        LayerCase("LayerNorm no bias", lambda: nn.LayerNorm((6, 5), bias=False), SEQUENCE),
        LayerCase("RMSNorm", lambda: nn.RMSNorm(6), ROW),
        LayerCase("GroupNorm", lambda: nn.GroupNorm(2, 4), IMAGE),
        LayerCase("LocalResponseNorm", lambda: nn.LocalResponseNorm(2), IMAGE),
        LayerCase("BatchNorm1d rows", lambda: nn.BatchNorm1d(6), ROW),
        LayerCase("BatchNorm2d plain", lambda: nn.BatchNorm2d(4, affine=False), IMAGE),
        LayerCase(
            "BatchNorm2d no statistics", lambda: nn.BatchNorm2d(4, track_running_stats=False).eval(), IMAGE
        ),
    ]
    for n, shape in SHAPES.items():
        for name in (f"BatchNorm{n}d", f"InstanceNorm{n}d"):
            layer, lazy, c = getattr(nn, name), getattr(nn, f"Lazy{name}"), shape[1]
            args: dict[str, Any] = dict(affine=True, track_running_stats=True)
            cases += [
                LayerCase(name, lambda layer=layer, c=c, args=args: layer(c, **args), shape),
                LayerCase(f"{name} eval", lambda layer=layer, c=c, args=args: layer(c, **args).eval(), shape),
                LayerCase(
                    f"Lazy{name}", lambda lazy=lazy, shape=shape: initialised(lazy(affine=True), shape), shape
                ),
            ]
        cases.append(
            LayerCase(f"InstanceNorm{n}d plain", lambda n=n, c=c: getattr(nn, f"InstanceNorm{n}d")(c), shape)
        )
    return cases


def sequences() -> list[LayerCase]:
    words = (SHOTS, 3, 8)  # [shots, time, feature]
    block: dict[str, Any] = dict(d_model=8, nhead=2, dim_feedforward=9, dropout=0.0, batch_first=True)
    encoder = lambda **kw: nn.TransformerEncoderLayer(**{**block, **kw})  # noqa: E731
    decoder = lambda: nn.TransformerDecoderLayer(**block)  # noqa: E731
    attention = lambda **kw: Call(  # noqa: E731
        nn.MultiheadAttention(8, 2, batch_first=True), lambda m, x: m(x, x, x, **kw)
    )
    whole = lambda: nn.Transformer(  # noqa: E731
        8, 2, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=9, dropout=0.0, batch_first=True
    )
    both = lambda m, x: m(x, x.flip(1))  # noqa: E731
    cases = [
        LayerCase("MultiheadAttention", lambda: attention(need_weights=False), words),
        LayerCase("MultiheadAttention weights", lambda: attention(need_weights=True), words),
        LayerCase("TransformerEncoderLayer", encoder, words),
        LayerCase("TransformerEncoderLayer eval", lambda: encoder(activation="gelu").eval(), words),
        LayerCase("TransformerEncoder", lambda: nn.TransformerEncoder(encoder(), 2), words),
        LayerCase("TransformerEncoder eval", lambda: nn.TransformerEncoder(encoder(), 2).eval(), words),
        LayerCase("TransformerDecoderLayer", lambda: Call(decoder(), both), words),
        LayerCase("TransformerDecoder", lambda: Call(nn.TransformerDecoder(decoder(), 2), both), words),
        LayerCase("Transformer", lambda: Call(whole(), both), words),
    ]
    for name in ("RNN", "LSTM", "GRU"):
        layer = getattr(nn, name)
        options: dict[str, Any] = dict(num_layers=2, bidirectional=True, batch_first=True)
        cases += [
            LayerCase(name, lambda layer=layer: layer(8, 5), words),
            LayerCase(f"{name} deep", lambda layer=layer, options=options: layer(8, 5, **options), words),
            LayerCase(f"{name} no bias", lambda layer=layer: layer(8, 5, bias=False), words),
            LayerCase(f"{name}Cell", lambda name=name: getattr(nn, f"{name}Cell")(6, 5), ROW),
        ]
    return [
        *cases,
        LayerCase("LSTM projection", lambda: nn.LSTM(8, 5, proj_size=3, bidirectional=True), words),
        LayerCase("RNN relu", lambda: nn.RNN(8, 5, nonlinearity="relu"), words),
        LayerCase("LSTM unbatched", lambda: nn.LSTM(8, 5), (SHOTS, 8)),
    ]


def near(m: Any, x: Tensor) -> Any:
    return m(x, target(x))


def first(m: Any, x: Tensor) -> Any:
    return m(x, ids(x, 3)[:, 0])


def several(m: Any, x: Tensor) -> Any:
    return m(x, ids(x, 6))


def triple(m: Any, x: Tensor) -> Any:
    return m(x, x.flip(0), x.roll(1, 0))


def spoken(m: Any, x: Tensor) -> Any:
    lengths = torch.full((x.shape[1],), 2)
    return m(x.log_softmax(-1), torch.ones(x.shape[1], 2, dtype=torch.long), 2 * lengths, lengths)


def losses() -> list[LayerCase]:
    against = (
        "MSELoss L1Loss SmoothL1Loss HuberLoss BCEWithLogitsLoss PoissonNLLLoss SoftMarginLoss "
        "MultiLabelSoftMarginLoss CosineSimilarity PairwiseDistance"
    )
    hinge = lambda m, x: m(x * x, -torch.ones_like(x))  # noqa: E731
    sign = lambda m, x: m(x, x.flip(0), torch.ones_like(x[:, 0]))  # noqa: E731
    spread = lambda m, x: m(x, target(x), x.exp())  # noqa: E731
    rank = lambda m, x: m(x, x.flip(0), target(x))  # noqa: E731
    chance = lambda m, x: m(torch.sigmoid(x), target(x))  # noqa: E731
    likely = lambda m, x: first(m, x.log_softmax(-1))  # noqa: E731
    calls: dict[str, Callable[[Any, Tensor], Any]] = {
        **dict.fromkeys(against.split(), near),
        "CrossEntropyLoss": first,
        "BCELoss": chance,
        "NLLLoss": likely,
        "GaussianNLLLoss": spread,
        "HingeEmbeddingLoss": hinge,
        "CosineEmbeddingLoss": sign,
        "MarginRankingLoss": rank,
        "TripletMarginLoss": triple,
        "TripletMarginWithDistanceLoss": triple,
    }
    return [
        *(
            LayerCase(n, lambda n=n, call=call: Call(getattr(nn, n)(), call), ROW)
            for n, call in calls.items()
        ),
        LayerCase("KLDivLoss", lambda: Call(nn.KLDivLoss(reduction="batchmean"), near), ROW),
        LayerCase("LinearCrossEntropyLoss", lambda: Call(nn.LinearCrossEntropyLoss(6, 3), first), ROW),
    ]


LAYERS = [*activations(), *linear(), *convolutions(), *pools(), *norms(), *sequences(), *losses()]

RANDOM: list[LayerCase] = [
    LayerCase(name, getattr(nn, name), ROW)
    for name in ("Dropout", "AlphaDropout", "FeatureAlphaDropout", "RReLU")
] + [LayerCase(f"Dropout{n}d", lambda n=n: getattr(nn, f"Dropout{n}d")(), SHAPES[n]) for n in (1, 2, 3)]

REFUSED: list[tuple[LayerCase, str]] = [
    (
        LayerCase("EmbeddingBag max", lambda: bag(mode="max"), ROW),
        "embedding_bag: only the sum or mean of bags of one size .* got mode='max'",
    ),
    (
        LayerCase("CTCLoss", lambda: Call(nn.CTCLoss(), spoken), SEQUENCE),
        "derivative for aten::_ctc_loss_backward is not implemented",
    ),
    (
        LayerCase("CrossMapLRN2d", lambda: nn.CrossMapLRN2d(2), IMAGE),
        "it must override the setup_context staticmethod",
    ),
    (
        LayerCase(
            "AdaptiveLogSoftmaxWithLoss",
            lambda: Call(
                nn.AdaptiveLogSoftmaxWithLoss(6, 6, [2, 4], div_value=1.0), lambda m, x: first(m, x).loss
            ),
            ROW,
        ),
        "batching operators that can output dynamic shape",
    ),
    (
        LayerCase("MultiMarginLoss", lambda: Call(nn.MultiMarginLoss(), first), ROW),
        "derivative for aten::multi_margin_loss_backward is not implemented",
    ),
    (
        LayerCase("MultiLabelMarginLoss", lambda: Call(nn.MultiLabelMarginLoss(), several), ROW),
        "derivative for aten::multilabel_margin_loss_backward is not implemented",
    ),
    (
        LayerCase(
            "LinearCrossEntropyLoss chunked",
            lambda: Call(nn.LinearCrossEntropyLoss(6, 3, options=nn.LinearCrossEntropyOptions()), first),
            ROW,
        ),
        "setup_context",
    ),
    (
        LayerCase("SyncBatchNorm", lambda: nn.SyncBatchNorm(6), ROW),
        "SyncBatchNorm at 'layer' is not supported",
    ),
    (
        LayerCase("spectral_norm", lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3)), ROW),
        "it changed 'layer.parametrizations.weight.0._u'",
    ),
    (
        LayerCase("LazyLinear", lambda: nn.LazyLinear(3), ROW),
        "LazyLinear at 'layer' has parameters without a shape",
    ),
]

WRONG_IN_TORCH = {
    "weight_norm": "its second derivative leaves out that the norm depends on the weight",
    "Hardsigmoid": "it has no second derivative",
    "EmbeddingBag": "it has no second derivative",
    "EmbeddingBag sum": "it has no second derivative",
    "EmbeddingBag padding": "it has no second derivative",
}
"""Layers whose reference cannot be torch's own: here only differences of the gradient count."""

NOT_LAYERS = {
    "Module": "the base class",
    "Container": "a base class without forward",
    "RNNBase": "a base class",
    "RNNCellBase": "a base class",
    "NLLLoss2d": "the old name of NLLLoss",
    "LinearCrossEntropyOptions": "options of a loss",
}
