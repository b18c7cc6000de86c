"""Options of tasks made from pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from fmeta.train.config import MaybeColour, MaybeFloat, MaybeInt, MaybePath, MaybeStr

AugmentName = Literal["affine", "crop", "flip", "jitter", "resized_crop"]


@dataclass(frozen=True)
class FewShotTask:
    """A task is a few classes that training never saw: learn them from a few pictures each."""

    ways: int = 5
    """Classes of a task."""
    shots: int = 1
    """Support pictures of a class."""
    queries: MaybeInt = None
    """Query pictures of a class; as many as shots if not given."""
    test_queries: MaybeInt = None
    """Query pictures of a class in validation and test; as many as queries if not given."""
    rotations: bool = True
    """Count a class turned by 90, 180 and 270 degrees as new classes (in training tasks only)."""
    augment: tuple[AugmentName, ...] = ()
    """How every picture of a training task is changed, each by amounts of its own: affine, turned, slanted, stretched
    and moved a little; crop, moved; flip, mirrored or not; jitter, other colours; resized_crop, a part of it.
    Several may follow each other. UMTRA's copies are changed by affine if none is given."""
    labels: bool = True
    """Whether training tasks are made from labels; see --unlabelled for how they are made without."""
    unlabelled: Literal["umtra", "cactus"] = "umtra"
    """Without labels: umtra, every picture is a class, and changed copies of it are its queries; cactus, classes
    are clusters (scikit-learn's k-means) of what an embedding makes of the pictures, which is learned first."""
    clusters: int = 500
    """Clusters of cactus."""
    embedding_steps: int = 2_000
    """Steps of learning its embedding; 0 takes principal components of the pixels."""
    train_ways: MaybeInt = None
    """Classes of a training task, for algorithms whose head is made from the support set; as ways if not given."""
    train_shots: MaybeInt = None
    """Support pictures of a class in training tasks; as shots if not given."""
    network: Literal["conv4", "resnet12", "mlp"] = "conv4"
    """Four convolutions; a residual network of twelve; or four fully connected layers (256, 128, 64, 64)."""
    channels: int = 64
    """Filters of each of conv4's convolutions."""
    pool: Literal["stride", "max"] = "stride"
    """How conv4 halves pictures: convolutions of stride 2, or max-pooling after those of stride 1."""
    flatten: bool = False
    """Whether conv4's features are those of all places, in place of their mean."""


@dataclass(frozen=True)
class OmniglotTask(FewShotTask):
    """A task is a few handwritten characters that training never saw: learn them from a few drawings each."""

    root: MaybePath = None
    """Folder of images_background and images_evaluation; else $FMETA_DATA/omniglot or fmeta's cache."""
    download: bool = False
    """Download the data set into the root if it is not there."""
    split: Literal["maml", "vinyals"] = "maml"
    """Training classes: the MAML paper's random 1200, or Vinyals' files. The two do not compare."""


@dataclass(frozen=True)
class ImagesTask(FewShotTask):
    """A task is a few classes of your own pictures that training never saw: learn them from a few pictures each."""

    root: Annotated[MaybePath, tyro.conf.arg(aliases=("--data",))] = None
    """A folder, or a zip, with a folder of pictures for each class. --data says the same."""
    index: MaybePath = None
    """A csv of file,label,split, which says what is in it and which classes are train, val and test."""
    shares: tuple[float, float, float] = (0.64, 0.16, 0.2)
    """Shares of the classes for training, validation and test where there is no index."""
    size: int = 84
    """Height and width that pictures are brought to."""
    grey: bool = False
    """One channel in place of red, green and blue."""
    backbone: MaybeStr = None
    """A model of torchvision in place of --network: resnet18, resnet50, mobilenet_v2, ...; or resnet20 (CIFAR's)."""
    weights: MaybeStr = None
    """Of the backbone: default, which torchvision downloads; a file (safetensors, or a state dict); random if not
    given."""
    learns: str = "last-1"
    """What of the backbone is learned: all; head; last-N, its last N blocks; norms; lora-RANK; or names such as
    layer4,layer3.1. The frozen parts before it run once, over all pictures, and their results are kept."""
    batch_norm: Literal["frozen", "batch"] = "frozen"
    """Statistics of the learned part's batch norms: those of the weights, or of each batch."""
    colour_mean: MaybeColour = None
    """Of red, green and blue in 0 .. 1, as the weights expect it; ImageNet's if not given."""
    colour_std: MaybeColour = None
    """Likewise."""
    norm_eps: MaybeFloat = None
    """Of batch norms, for weights of other libraries (Keras: 0.001); the model's own if not given."""
