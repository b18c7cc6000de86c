"""Modules as pure functions that differentiate and batch rightly, and the operations that this takes.

``functionalize`` is what callers use. ``layers`` says what becomes of each kind of layer; ``norms``, ``recurrent``,
``rewrites`` and ``linalg`` write out what torch's own operations do not allow.
"""

from fmeta.functional.functionalize import Apply, check_apply, differentiable, functionalize

__all__ = ["Apply", "check_apply", "differentiable", "functionalize"]
