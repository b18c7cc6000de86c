"""Optimisers, inner and outer, as records of two pure functions."""

from fmeta.optim.adagrad import adagrad as adagrad
from fmeta.optim.adam import adam as adam
from fmeta.optim.adam import adamw as adamw
from fmeta.optim.clip import clip_by_norm as clip_by_norm
from fmeta.optim.clip import clip_by_value as clip_by_value
from fmeta.optim.combine import as_inner as as_inner
from fmeta.optim.combine import chain as chain
from fmeta.optim.combine import masked as masked
from fmeta.optim.lion import lion as lion
from fmeta.optim.rmsprop import rmsprop as rmsprop
from fmeta.optim.sgd import sgd as sgd
