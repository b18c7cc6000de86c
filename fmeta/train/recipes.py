"""Recipes: functions that return the complete config of a run; `fmeta list` shows their first line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fmeta.train.config import Config, Inner, Machine, Outer, Report, SinusoidTask
from fmeta.train.detection.config import DetectionTask
from fmeta.train.learning.config import LearningConfig, LearningTask
from fmeta.train.pictures.config import FewShotTask, ImagesTask, OmniglotTask
from fmeta.train.text.config import TextTask


def sinusoid() -> Config[SinusoidTask]:
    """Regression of sine waves from a handful of points; needs no data, takes minutes on two cores.

    The experiment of section 5.1 of the MAML paper (arXiv 1703.03400): a network of two hidden layers is
    trained to fit a wave in one gradient step on 10 points, and tested with 5 points and 0 to 10 steps. The
    paper reports a mean squared error of 0.67, 0.38 and 0.35 after 1, 5 and 10 steps. Deviations: 20,000
    steps at an outer rate of 0.006 that falls to zero in the last tenth, where the paper takes 70,000 at 0.001;
    initial weights are torch's. (A rate that falls earlier ends in sharper minima, where some tasks diverge
    after several steps.)
    """
    return Config(
        recipe="sinusoid",
        task=SinusoidTask(),
        inner=Inner(inner_lr=0.01, inner_steps=1, test_steps=10),
        outer=Outer(tasks=25, outer_steps=20_000, outer_lr=6e-3, schedule="cooldown"),
        report=Report(log_interval=100, val_interval=1_000, val_tasks=500),
        machine=Machine(threads=1),  # the kernels are too small to gain from a second one
    )


def glyphs() -> Config[FewShotTask]:
    """Characters of scripts that training never saw, from one picture each; needs no data.

    Pictures are rendered from the fonts that come with matplotlib, a character is a class, and scripts are
    split between training, validation and test. The protocol is that of the omniglot recipe, but for half as
    many filters, a higher outer rate, and five query pictures a class, which learn faster.
    """
    return Config(
        recipe="glyphs",
        task=FewShotTask(channels=32, queries=5),
        inner=Inner(inner_lr=0.4, inner_steps=1, test_steps=3),
        outer=Outer(tasks=32, outer_steps=6_000, outer_lr=3e-3),
        report=Report(log_interval=50, val_interval=500, val_tasks=200, test_tasks=1_000),
    )


def omniglot() -> Config[OmniglotTask]:
    """Handwritten characters that training never saw, from one drawing each; needs the Omniglot data set.

    The 5-way protocol of the MAML paper (arXiv 1703.03400, appendix A.1): four strided convolutions, batch
    norm on the statistics of each batch, one inner step at rate 0.4 in training and three in test, 32 tasks a
    step, as many queries as shots, rotations as new classes. The norm's parameters are meta-learned and do
    not adapt, as in the authors' code. The paper reports 98.7 % for 5 ways and 1 shot after 60,000 steps.
    """
    return Config(
        recipe="omniglot",
        task=OmniglotTask(),
        inner=Inner(inner_lr=0.4, inner_steps=1, test_steps=3),
        outer=Outer(tasks=32, outer_steps=6_500),
        report=Report(log_interval=50, val_interval=250, val_tasks=300, test_tasks=1_000),
    )


def images() -> Config[ImagesTask]:
    """Your own pictures, a folder a class: learn classes that training never saw from a few pictures each.

    `fmeta train images --root FOLDER`. Classes are divided into training, validation and test (or by an index,
    `--index`). The network and rates are those that MAML's paper has for miniImageNet (arXiv 1703.03400,
    appendix A.1): four convolutions of 32 filters with max-pooling, all features, five inner steps at rate 0.01,
    15 query pictures a class. A pre-trained model in place of these: `--backbone resnet18 --weights default`, of
    which `--learns` says what is learned; `--algorithm protonet` is a strong choice then.
    """
    return Config(
        recipe="images",
        task=ImagesTask(channels=32, pool="max", flatten=True, queries=15, rotations=False),
        inner=Inner(inner_lr=0.01, inner_steps=5, test_steps=10),
        outer=Outer(tasks=4, outer_steps=6_000),
        report=Report(log_interval=50, val_interval=250, val_tasks=200, test_tasks=1_000),
    )


def detection() -> Config[DetectionTask]:
    """Find new kinds of objects from a few pictures with boxes; needs pycocotools, or pip install 'fmeta[detection]'.

    `fmeta train detection --data FOLDER[,FOLDER] --backbone-weights FILE`. Faster R-CNN whose backbone is frozen: a
    base is trained on generated scenes (characters on plates and textures) and your folders, then its heads are
    meta-learned by first-order MAML on tasks of a few classes, and adapt to those of a new data set in a minute.
    --algorithm is fomaml, maml, anil (the last layer adapts) or reptile.
    """
    return Config(
        recipe="detection",
        task=DetectionTask(),
        inner=Inner(algorithm="fomaml", inner_lr=0.01, inner_steps=4, test_steps=100),
        outer=Outer(tasks=2, outer_steps=200, outer_lr=3e-4),
        report=Report(log_interval=10, val_interval=50, val_tasks=8, test_tasks=4, baselines=False),
    )


def text() -> Config[TextTask]:
    """Your own sentences with labels: learn labels that training never saw from a few sentences each.

    `fmeta train text --data FILE.csv` with columns text and label. Labels are divided into training, validation and
    test (or by a file, `--splits`). A linear map behind a pre-trained encoder becomes a prototypical network
    (arXiv 1703.05175) on training tasks of many labels; the encoder runs once for each sentence. Afterwards
    `fmeta adapt RUN --support FEW.csv --query NEW.csv` tells new labels apart.
    """
    return Config(
        recipe="text",
        task=TextTask(train_shots=2),
        inner=Inner(algorithm="protonet", inner_lr=0.1, inner_steps=5, test_steps=5),
        outer=Outer(tasks=4, outer_steps=150, outer_lr=3e-4, schedule="cosine"),
        report=Report(log_interval=10, val_interval=25, val_tasks=200, test_tasks=600, baselines=False),
        machine=Machine(compile="off"),  # every length of sentences would be compiled for itself
    )


def learned_optimizer() -> LearningConfig:
    """An optimiser that is learned: it trains small networks, and is judged by how fast; needs no data.

    `fmeta train learned-optimizer`. Many small trainings run side by side, and the weights of the optimiser follow
    the gradient of the mean logarithm of their losses, through 100 steps at a time. It is then tested on unseen data
    and other networks, beside SGD, Adam, AdamW and Lion at the best of 13 rates each. `fmeta.learned.load(RUN)`
    trains any model with it, also as a torch.optim.Optimizer.
    """
    return LearningConfig(
        recipe="learned-optimizer",
        task=LearningTask(),
        outer=Outer(tasks=16, outer_steps=2_000, outer_lr=1e-3),
        report=Report(log_interval=10, val_interval=100, val_tasks=32, test_tasks=200, baselines=False),
        machine=Machine(threads=1),
    )


RECIPES: dict[str, Callable[[], Config[Any]]] = {
    "sinusoid": sinusoid,
    "glyphs": glyphs,
    "omniglot": omniglot,
    "images": images,
    "detection": detection,
    "text": text,
    "learned-optimizer": learned_optimizer,
}
