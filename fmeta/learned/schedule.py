"""``schedule``: the transformer of ``meta_transformer`` alone, a learned step size for each tensor and time."""

from __future__ import annotations

from typing import Any

from fmeta.learned.meta_transformer import check_settings, meta_transformer, told
from fmeta.learned.rule import LearnedOptimizer


def schedule(
    *, lr: float = 1e-3, width: int = 32, layers: int = 2, heads: int = 4, longest: int | None = None
) -> LearnedOptimizer:
    """Adam whose step size a transformer sets, for each parameter tensor and step.

    ``params -= lr * exp(s) * (adam direction)``: the ablation of ``meta_transformer`` without its policy, and a learned
    learning-rate schedule. Arguments as for ``meta_transformer``.

    Example:
        >>> import fmeta
        >>> rule = fmeta.learned.schedule(lr=0.1)
        >>> sorted(rule.init(0))[:2]
        ['global.bias', 'global.weight']
    """
    settings: dict[str, Any] = dict(lr=lr, width=width, layers=layers, heads=heads, **told(longest))
    check_settings("schedule", **settings)
    rule = meta_transformer(**settings, policy=False)
    return rule._replace(name="schedule", settings=settings)
