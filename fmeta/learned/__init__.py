"""Optimisers that are learned: ``rule(theta)`` is a ``Transform`` like any other."""

from fmeta.learned import problems as problems
from fmeta.learned.comparison import at_rates as at_rates
from fmeta.learned.comparison import curves as curves
from fmeta.learned.files import FILE as FILE
from fmeta.learned.files import Loaded as Loaded
from fmeta.learned.files import load as load
from fmeta.learned.files import save as save
from fmeta.learned.lstm import lstm as lstm
from fmeta.learned.meta_transformer import meta_transformer as meta_transformer
from fmeta.learned.mlp import mlp as mlp
from fmeta.learned.optimizer import Optimizer as Optimizer
from fmeta.learned.rule import LearnedOptimizer as LearnedOptimizer
from fmeta.learned.schedule import schedule as schedule
from fmeta.learned.text import text as text
from fmeta.learned.training import training as training
