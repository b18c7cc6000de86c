"""A backbone in a recipe: which of its parts are learned, the features of the others, and its names again."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fmeta
import fmeta.data
import fmeta.tasks
from fmeta.data.features import weights_digest
from fmeta.data.pool import Pools
from fmeta.models.backbones import architecture, backbone, head_name, set_outputs, set_submodule
from fmeta.parts.select import matches
from fmeta.train.pictures.config import ImagesTask
from fmeta.train.terminal import say
from fmeta.types import Params, Sampler

MOST = 3
"""Numbers in the features of a picture for each number in the picture, up to which they are kept."""


class Pieces(NamedTuple):
    """A backbone without its head, cut where learning begins."""

    whole: nn.Module
    """The embedding, with what was put in (low-rank updates)."""
    plain: nn.Module
    """The embedding as torchvision has it."""
    head: str
    """The name of the head that was taken off."""
    width: int
    """Features that the head takes."""
    bias: bool
    """Whether it has a bias."""
    trunk: nn.Module | None
    """What runs once; None where learning begins near the pictures."""
    body: nn.Module
    """What is learned of the embedding, and what is frozen behind it."""


class Headed(nn.Module):
    """A body and a head that is called ``head``, as in the models of ``fmeta.models``."""

    def __init__(self, body: nn.Module, width: int, outputs: int | None, bias: bool) -> None:
        """Without outputs the embedding."""
        super().__init__()
        self.body = body
        self.head = nn.Identity() if outputs is None else nn.Linear(width, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.head(self.body(x))


class Made(NamedTuple):
    """A backbone, and the model that a recipe makes of it."""

    pieces: Pieces
    model: Callable[[int | None], nn.Module]
    pretrained: Callable[[], str]
    """A checksum of the backbone as it came."""


class Prepared(NamedTuple):
    """What a recipe trains with."""

    pools: Pools
    """Features; training pictures as they are where they change from step to step."""
    made: Made
    behind: Callable[[Sampler], Sampler]
    """What training tasks go through before the model."""


def make_backbone(task: ImagesTask) -> Made:
    """The backbone of a task and its model.

    Raises:
        ValueError: for a choice of parts that is none.
    """
    found = pieces(task)

    def model(outputs: int | None) -> nn.Module:
        body = pieces(task, drawn=True).body if draws(task, found) else copy.deepcopy(found.body)
        return Headed(body, found.width, outputs, found.bias)

    return Made(found, model, functools.cache(lambda: weights_digest(found.plain)))


def with_backbone(task: ImagesTask, pools: Pools) -> Prepared:
    """Pools of what the frozen parts make of the pictures, and the model for them.

    Raises:
        ValueError: for a choice of parts that is none.
    """
    made = make_backbone(task)
    if task.weights in (None, "none") and (task.batch_norm == "frozen" or made.pieces.trunk is not None):
        say(
            f"{task.backbone} has random weights, and what is frozen of it stays so: --weights default downloads "
            "trained ones, --weights FILE reads them, --learns all --batch-norm batch trains all"
        )
    if made.pieces.trunk is None:
        return Prepared(pools, made, lambda sampler: sampler)
    trunk = made.pieces.trunk.to(pools.train.x.device)
    if task.rotations or task.augment or not task.labels:
        held = (fmeta.data.embedded(part, trunk) for part in (pools.val, pools.test))
        return Prepared(Pools(pools.train, *held), made, lambda sampler: fmeta.tasks.through(sampler, trunk))
    return Prepared(fmeta.data.embedded(pools, trunk), made, lambda sampler: sampler)


def draws(task: ImagesTask, found: Pieces) -> bool:
    """Whether a run draws the whole backbone from its seed, what is frozen of it too."""
    return found.trunk is None and task.weights is None


def pieces_of_run(task: ImagesTask, seed: int) -> Pieces:
    """The backbone that a run with this seed began with."""
    found = pieces(task)
    if not draws(task, found):
        return found
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return pieces(task, drawn=True)


def pieces(task: ImagesTask, drawn: bool = False) -> Pieces:
    """The backbone that a task's options name, cut; random parts are the same always, unless ``drawn``."""
    assert task.backbone is not None
    with torch.random.fork_rng(enabled=not drawn):
        if not drawn:
            torch.manual_seed(0)
        plain = backbone(
            task.backbone,
            None if task.weights == "none" else task.weights,
            mean=task.colour_mean,
            std=task.colour_std,
            norm_eps=task.norm_eps,
        )
        original = architecture(task.backbone)
    head = head_name(original)
    last: Any = original.get_submodule(head)
    whole, names = learned(plain, task.learns)
    trunk, body = cut(whole, names, (1 if task.grey else 3, task.size, task.size))
    if task.batch_norm == "batch":
        for layer in body.modules():
            layer.training = isinstance(layer, nn.modules.batchnorm._BatchNorm)
    return Pieces(whole, plain, head, last.in_features, last.bias is not None, trunk, body)


def cut(whole: nn.Module, names: list[str], picture: tuple[int, ...]) -> tuple[nn.Module | None, nn.Module]:
    """Trunk and body for what is learned.

    There is no trunk where its features would take much more memory than pictures do, or are several tensors.
    """
    everything = [name for name, _ in whole.named_parameters()]
    if not names:
        return whole, nn.Identity()
    if len(names) == len(everything):
        return None, whole
    trunk, body = fmeta.split(whole, names)
    with torch.no_grad():
        features = trunk(torch.zeros(1, *picture))
    if isinstance(features, Tensor) and features.numel() <= MOST * math.prod(picture):
        return trunk, body
    body = copy.deepcopy(whole)
    for name, p in body.named_parameters():
        p.requires_grad = name in names
    return None, body


def learned(module: nn.Module, learns: str) -> tuple[nn.Module, list[str]]:
    """The module with what is put in, and the names of its learned parameters.

    Raises:
        ValueError: for a choice that is none.
    """
    names = dict(module.named_parameters())
    word, _, number = learns.partition("-")
    if learns == "all":
        return module, list(names)
    if learns == "head":
        return module, []
    if learns == "norms":
        return module, fmeta.norm_names(module)
    if word in ("last", "lora") and number.isdecimal():
        if word == "last":
            return module, fmeta.last_blocks(names, int(number))
        whole = fmeta.with_lora(module, products(module), rank=int(number))
        return whole, [name for name, _ in whole.named_parameters() if ".lora_" in name]
    try:
        return module, matches(learns.split(","), names)
    except ValueError as error:
        raise ValueError(
            f"train: --learns must be all, head, norms, last-N, lora-RANK or names of parameters, got {learns!r} "
            f"({error})"
        ) from error


def products(module: nn.Module) -> list[str]:
    """Names of the layers that can have a low-rank update."""
    return [
        name
        for name, layer in module.named_modules()
        if type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.groups == 1)
    ]


def original(task: ImagesTask, cut: Pieces, params: Params) -> tuple[nn.Module, Params]:
    """The backbone in torchvision's own names, and its parameters: ``params`` of the run's model and frozen ones.

    The module has a head where ``params`` has one.

    Raises:
        NotImplementedError: for a bias that the architecture's own head does not have.
    """
    own = {name.removeprefix("body."): p for name, p in params.items() if name.startswith("body.")}
    everything = {name: p.detach() for name, p in cut.whole.named_parameters()} | own
    named = fmeta.merged(everything)
    module = copy.deepcopy(cut.plain)
    if "head.weight" in params:
        ways = len(params["head.weight"])
        named |= {f"{cut.head}.{n[5:]}": p for n, p in params.items() if n.startswith("head.")}
        if "head.bias" in params and not cut.bias:
            raise NotImplementedError(
                f"export: the head of {task.backbone} has no bias, but this classifier has one. Export a program "
                "(--what program), or train with an algorithm that adapts the model's own head, anil say."
            )
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of classifiers beside the head, which nothing learns
            set_submodule(module, cut.head, nn.Linear(cut.width, ways, bias=cut.bias))
            set_outputs(module, ways)
    return module, named
