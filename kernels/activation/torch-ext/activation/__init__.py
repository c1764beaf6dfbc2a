"""Activation functions, correctly rounded in bfloat16 and float16, as kernels-community/activation has them.

Every function writes its result to ``out`` and returns it; in gated units the last dimension of the input is twice that
of ``out``. The arithmetic is rarefy's: its code and native library lie beside this file, under a name of their own, so
that neither an installed rarefy is needed nor one that is there is touched.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from torch import Tensor


def _rarefy():
    """Import what lies beside this file under its name of its own, which the build has written into every file."""
    (folder,) = Path(__file__).parent.glob("rarefy_*")
    if folder.name not in sys.modules:
        spec = spec_from_file_location(folder.name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        sys.modules[folder.name] = module = module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[folder.name]


act = _rarefy().act

from . import layers  # noqa: E402  (they use act)


def silu(out: Tensor, x: Tensor) -> Tensor:
    """Compute x * sigmoid(x)."""
    return act.silu(x, out=out)


def gelu(out: Tensor, x: Tensor) -> Tensor:
    """Compute x Phi(x)."""
    return act.gelu(x, out=out)


def gelu_tanh(out: Tensor, x: Tensor) -> Tensor:
    """Compute GELU by tanh."""
    return act.gelu(x, approximate="tanh", out=out)


gelu_new = gelu_fast = gelu_tanh  # other writings of the same function


def gelu_quick(out: Tensor, x: Tensor) -> Tensor:
    """Compute x * sigmoid(1.702 x)."""
    return act.quick_gelu(x, out=out)


def silu_and_mul(out: Tensor, x: Tensor) -> Tensor:
    """Compute silu(gate) * up of x = [gate | up]."""
    return act.silu_and_mul(x, out=out)


def mul_and_silu(out: Tensor, x: Tensor) -> Tensor:
    """Compute up * silu(gate) of x = [up | gate]."""
    up, gate = x.chunk(2, -1)
    return act.silu_and_mul(gate, up, out=out)


def gelu_and_mul(out: Tensor, x: Tensor) -> Tensor:
    """Compute gelu(gate) * up of x = [gate | up]."""
    return act.gelu_and_mul(x, out=out)


def gelu_tanh_and_mul(out: Tensor, x: Tensor) -> Tensor:
    """Compute GELU by tanh of the gate, times up, of x = [gate | up]."""
    return act.gelu_tanh_and_mul(x, out=out)


__all__ = [
    "gelu",
    "gelu_and_mul",
    "gelu_fast",
    "gelu_new",
    "gelu_quick",
    "gelu_tanh",
    "gelu_tanh_and_mul",
    "layers",
    "mul_and_silu",
    "silu",
    "silu_and_mul",
]
