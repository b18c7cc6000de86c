"""Modules as pure functions that differentiate and batch rightly, and the operations that this takes.

``functionalize`` is what callers use. ``layers`` says what becomes of each kind of layer; ``norms``, ``recurrent``,
``rewrites`` and ``linalg`` write out what torch's own operations do not allow.
"""

from fmeta.functional.functionalize import Apply, check_apply, differentiable, functionalize
from fmeta.functional.layers import calling_layers

__all__ = ["Apply", "calling_layers", "check_apply", "differentiable", "functionalize"]
