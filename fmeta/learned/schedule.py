"""``schedule``: the transformer of ``meta_transformer`` alone, a learned step size for each tensor and time."""

from __future__ import annotations

from fmeta.learned.meta_transformer import meta_transformer
from fmeta.learned.rule import LearnedOptimizer
from fmeta.rates import positive
from fmeta.tasks.checks import check_counts


def schedule(*, lr: float = 1e-3, width: int = 32, layers: int = 2, heads: int = 4) -> LearnedOptimizer:
    """Adam whose step size a transformer sets, for each parameter tensor and step.

    ``params -= lr * exp(s) * (adam direction)``: the ablation of ``meta_transformer`` without its policy, and a learned
    learning-rate schedule. Arguments as for ``meta_transformer``.

    Example:
        >>> import fmeta
        >>> rule = fmeta.learned.schedule(lr=0.1)
        >>> sorted(rule.init(0))[:2]
        ['global.bias', 'global.weight']
    """
    positive("schedule", "lr", lr)
    check_counts("schedule", width=width, layers=layers, heads=heads)
    if width % heads:
        raise ValueError(
            f"schedule: width must be a multiple of heads, got {width} and {heads}. Pass 32 and 4, say."
        )
    rule = meta_transformer(lr=lr, width=width, layers=layers, heads=heads, policy=False)
    return rule._replace(
        name="schedule", settings={"lr": lr, "width": width, "layers": layers, "heads": heads}
    )
