"""What each ATen operator becomes in the plan; those that are not here stay operators, which PyTorch runs.

A module a kind of operator: look for ``aten.NAME`` in this folder. All of them are imported here, and so every handler
is known to :func:`handler`, whoever imports what of them.
"""

from rarefy.engine.operators import (  # noqa: F401 - they register their handlers
    attention,
    moving,
    norms,
    pointwise,
    pools,
    products,
)
from rarefy.engine.operators.calls import Call, Handler, handler

__all__ = ["Call", "Handler", "handler"]
