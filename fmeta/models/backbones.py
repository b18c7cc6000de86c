"""Image models of torchvision, pre-trained or not, with a head of one's own."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fmeta import weights as files
from fmeta.models.resnet20 import ResNet20

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's red, green and blue in 0 .. 1: what torchvision's models were trained with."""
OTHERS = {"resnet20": ResNet20}
"""Models beside torchvision's."""
INCEPTION = ("googlenet", "inception_v3")
AUXILIARY = ("aux1.fc2", "aux2.fc2", "AuxLogits.fc")
"""The last layers of GoogLeNet's and Inception's further classifiers, which evaluation does not look at."""
CALL = "backbone"


def backbone(
    name: str,
    weights: str | Path | Any | None = None,
    ways: int | None = None,
    *,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    norm_eps: float | None = None,
) -> nn.Module:
    """A model of torchvision for pictures in 0 .. 1, in evaluation mode, with a new head.

    It is an object of torchvision's class with torchvision's parameter names, so that its ``state_dict`` loads
    into the original (``num_classes=ways``) with ``strict=True``. Colours are normalised inside; one grey channel
    is taken for all three. In evaluation mode batch norm uses the running statistics and nothing is dropped;
    ``functionalize(module, batch_norm="batch")`` takes each batch's own statistics.

    Args:
        name: ``"resnet18"``, ``"mobilenet_v2"``, any classifier of ``torchvision.models``, or ``"resnet20"``, the
            network for CIFAR.
        weights: None for random ones; ``"default"``, which torchvision downloads once; an entry of torchvision's
            weights enum; or the path of a file, see ``fmeta.weights.read``. What it holds for the head is left out
            where the number of outputs differs; so is what ``fmeta export`` keeps beside the weights.
        ways: outputs of the head, drawn by torch's rule where the weights have no such one; None leaves it out and
            gives the embedding.
        mean: of red, green and blue as the weights expect them; the default is ImageNet's, or what torchvision says
            of its weights.
        std: likewise.
        norm_eps: of batch norm layers, for weights of other libraries (Keras has 0.001); the model's own if None.

    Raises:
        ValueError: for an unknown name, weights of another architecture, a download that fails.
        NotImplementedError: for a model without a linear head.

    >>> model = backbone("resnet18", ways=5)
    >>> head_name(model), model(torch.rand(2, 3, 64, 64)).shape
    ('fc', torch.Size([2, 5]))
    """
    module: Any = architecture(name)
    head = head_name(module)
    found = pretrained(name, weights)
    if ways is not None:
        set_outputs(module, ways)
    if found.tensors is not None:
        own = module.state_dict()
        new = [n for layer in head_names(module) for n in unfit(found.tensors, head_tensors(layer, own))]
        module = files.load(module, found.tensors, new=new or None, source=str(weights))
    if ways is None:
        set_submodule(module, head, nn.Identity())
    for part in module.modules():
        if norm_eps is not None and isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eps = norm_eps
    return normalised(module, mean or found.mean, std or found.std).eval()


class Pretrained(NamedTuple):
    """Weights, and the colours that they expect."""

    tensors: Mapping[str, Tensor] | None
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


def names() -> list[str]:
    """All that ``backbone`` knows."""
    from torchvision import models

    return sorted([*models.list_models(module=models), *OTHERS])


def architecture(name: str) -> nn.Module:
    """A model with random weights and the head it was published with."""
    from torchvision import models

    if name not in names():
        near = difflib.get_close_matches(name, names(), n=4)
        hint = f"Near ones are {', '.join(near)}." if near else "fmeta.models.backbones.names() lists them."
        raise ValueError(f"{CALL}: name must be a classifier of torchvision.models, got {name!r}. {hint}")
    if name in OTHERS:
        return OTHERS[name]()
    # the published Inception networks change colours first, which no weight says: so do all here, in and out of files
    plain = {"init_weights": True, "transform_input": True} if name in INCEPTION else {}
    return models.get_model(name, weights=None, **plain)


def head_name(module: nn.Module) -> str:
    """Name of the last linear layer, which is the head of a classifier.

    Raises:
        NotImplementedError: for a module without one.
    """
    linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise NotImplementedError(
            f"{CALL}: a model whose last layer is nn.Linear was expected, got {type(module).__name__}. Choose "
            "another, or replace its head by hand."
        )
    return linear[-1]


def head_names(module: nn.Module) -> list[str]:
    """Names of all layers with an output a class: the head is the last of them."""
    layers = dict(module.named_modules())
    return [*(name for name in AUXILIARY if name in layers), head_name(module)]


def head_tensors(head: str, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head's part of a state dict."""
    return {name: x for name, x in own.items() if name.startswith(f"{head}.")}


def unfit(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """All names of a layer's tensors, if one of them is not given in this shape; else none."""
    fits = all(name in given and given[name].shape == x.shape for name, x in own.items())
    return [] if fits else list(own)


def set_outputs(module: nn.Module, ways: int) -> None:
    """Put new layers in the place of those with an output a class, where they have another number."""
    for name in head_names(module):
        layer: Any = module.get_submodule(name)
        if layer.out_features != ways:
            set_submodule(module, name, nn.Linear(layer.in_features, ways, bias=layer.bias is not None))


def set_submodule(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of a named one."""
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, layer)


def pretrained(name: str, weights: Any) -> Pretrained:
    """What ``weights`` stands for."""
    if weights is None:
        return Pretrained(None)
    if isinstance(weights, Path) or (isinstance(weights, str) and (Path(weights).suffix or "/" in weights)):
        return Pretrained(files.read(weights, beside=False))
    if name in OTHERS:
        raise ValueError(
            f"{CALL}: weights of {name} must be a file or None, got {weights!r}. There is nothing to download."
        )
    entry = published(name, weights)
    try:
        tensors = entry.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{CALL}: the weights of {name} could not be downloaded from {entry.url} ({error}). Fetch that file on "
            "another machine and give its path as weights."
        ) from error
    colours = entry.transforms()
    return Pretrained(tensors, tuple(getattr(colours, "mean", MEAN)), tuple(getattr(colours, "std", STD)))


def published(name: str, weights: Any) -> Any:
    """An entry of torchvision's weights enum."""
    from torchvision import models

    kind = models.get_model_weights(name)
    if isinstance(weights, kind):
        return weights
    wanted = str(weights).upper()
    if wanted not in kind.__members__:
        raise ValueError(
            f"{CALL}: weights of {name} must be a file, 'default' or one of {', '.join(kind.__members__)}, got "
            f"{weights!r}."
        )
    return kind[wanted]


class Normalised:
    """Comes before a model's class: pictures in 0 .. 1, of one or three channels, in the colours it expects."""

    def forward(self: Any, x: Tensor) -> Any:  # noqa: D102
        return super().forward((x.expand(-1, 3, -1, -1) - self.colour_mean) / self.colour_std)  # type: ignore[misc]


def normalised(module: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> nn.Module:
    """The same module, which normalises colours first; its state dict stays that of the original."""
    module.register_buffer("colour_mean", torch.tensor(mean)[:, None, None], persistent=False)
    module.register_buffer("colour_std", torch.tensor(std)[:, None, None], persistent=False)
    kind = type(module)
    module.__class__ = type(f"Normalised{kind.__name__}", (Normalised, kind), {})
    return module
