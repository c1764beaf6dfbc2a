"""The functions as modules."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from rarefy.act import functional, gated, gradients
from rarefy.act.kernels.aten import table_of
from rarefy.act.spec import reference
from rarefy.act.spec.table import Table


class Activation(nn.Module):
    """What the modules share: ``mode``, ``grad`` and ``table`` as in :mod:`rarefy.act.functional`."""

    function: str
    mode: str
    grad: str | None
    table: Table | None

    def __init__(
        self, mode: str = "exact", *, grad: str | None = None, table: Table | str | Path | None = None
    ) -> None:
        super().__init__()
        self.configure(mode, grad, table)

    def configure(self, mode: str, grad: str | None, table: Table | str | Path | None) -> None:
        """Set the three options; raises ValueError for those that no function takes."""
        given = table_of(table)
        reference.check_mode(self.function, mode)
        if given is not None and mode != "ktanh":
            raise ValueError(f'a table goes with mode="ktanh", got mode={mode!r}')
        gradients.resolve(self.function, mode, grad)
        self.mode, self.grad, self.table = mode, grad, given

    def __prepare_scriptable__(self) -> nn.Module:
        """``torch.jit.script`` asks for this; raises RuntimeError, since a table and its options are no TorchScript."""
        raise RuntimeError(
            f"{type(self).__name__} of rarefy.act cannot be scripted: use torch.jit.trace, which records it as one"
            " operator, or restore() the model first"
        )

    def extra_repr(self) -> str:
        """Return the options that are not the default."""
        parts = [f"mode={self.mode!r}"]
        parts += [f"grad={self.grad!r}"] if self.grad is not None else []
        parts += [f"table={self.table.name!r}"] if self.table is not None else []
        return ", ".join(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Take any shape and return the same."""
        result: Tensor = getattr(functional, self.function)(x, self.mode, grad=self.grad, table=self.table)
        return result


class InPlace(Activation):
    """Those whose PyTorch module has ``inplace``: it writes the result over the input."""

    def __init__(
        self,
        mode: str = "exact",
        *,
        inplace: bool = False,
        grad: str | None = None,
        table: Table | str | Path | None = None,
    ) -> None:
        super().__init__(mode, grad=grad, table=table)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        """Take any shape and return the same."""
        if not self.inplace:
            return super().forward(x)
        function = getattr(functional, self.function)
        return functional.in_place(function, x, mode=self.mode, grad=self.grad, table=self.table)

    def extra_repr(self) -> str:
        """Return the options that are not the default."""
        return super().extra_repr() + (", inplace=True" if self.inplace else "")


class Tanh(Activation):
    """:func:`rarefy.act.tanh` as a module."""

    function = "tanh"


class Sigmoid(Activation):
    """:func:`rarefy.act.sigmoid` as a module."""

    function = "sigmoid"


class SiLU(InPlace):
    """:func:`rarefy.act.silu` as a module."""

    function = "silu"


class Mish(InPlace):
    """:func:`rarefy.act.mish` as a module."""

    function = "mish"


class Hardswish(InPlace):
    """:func:`rarefy.act.hardswish` as a module."""

    function = "hardswish"


class ELU(InPlace):
    """:func:`rarefy.act.elu` as a module."""

    function = "elu"


class Softplus(Activation):
    """:func:`rarefy.act.softplus` as a module."""

    function = "softplus"


class QuickGELU(Activation):
    """:func:`rarefy.act.quick_gelu` as a module."""

    function = "quick_gelu"


class GELU(Activation):
    """:func:`rarefy.act.gelu` as a module; ``approximate`` is "none" or "tanh"."""

    function = "gelu"

    def __init__(
        self,
        mode: str = "exact",
        *,
        approximate: str = "none",
        grad: str | None = None,
        table: Table | str | Path | None = None,
    ) -> None:
        super().__init__(mode, grad=grad, table=table)
        if approximate not in ("none", "tanh"):
            raise ValueError(f'approximate must be "none" or "tanh", got {approximate!r}')
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """Take any shape and return the same."""
        return functional.gelu(x, self.mode, approximate=self.approximate, grad=self.grad, table=self.table)


class Gated(Activation):
    """What the modules of gated units share."""

    def forward(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        """Take [..., 2 d], the gate and then up, and return [..., d]; or the gate and ``up`` of one shape."""
        return gated.UNITS[self.function](x, up, self.mode, grad=self.grad, table=self.table)


class SiluAndMul(Gated):
    """:func:`rarefy.act.silu_and_mul` as a module."""

    function = "silu"


class GeluAndMul(Gated):
    """:func:`rarefy.act.gelu_and_mul` as a module."""

    function = "gelu"


class GeluTanhAndMul(Gated):
    """:func:`rarefy.act.gelu_tanh_and_mul` as a module."""

    function = "gelu_tanh"
