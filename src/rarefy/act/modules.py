"""The functions as modules."""

from __future__ import annotations

from torch import Tensor, nn

from rarefy.act import functional, gradients
from rarefy.act.kernels.aten import given_table
from rarefy.act.spec import reference
from rarefy.act.spec.table import Table


class Activation(nn.Module):
    """What the modules share: ``mode``, ``grad`` and ``table`` as in :mod:`rarefy.act.functional`."""

    function: str
    mode: str
    grad: str | None
    table: Table | None

    def __init__(self, mode: str = "exact", *, grad: str | None = None, table: Table | str | None = None) -> None:
        super().__init__()
        self.configure(mode, grad, table)

    def configure(self, mode: str, grad: str | None, table: Table | str | None) -> None:
        """Set the three options; raises ValueError for those that no function takes."""
        given = given_table(table) if isinstance(table, str) else table
        if mode not in reference.MODES:
            raise ValueError(f"mode must be one of {', '.join(reference.MODES)}, got {mode!r}")
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


class Tanh(Activation):
    """:func:`rarefy.act.tanh` as a module."""

    function = "tanh"

    def forward(self, x: Tensor) -> Tensor:
        """Take any shape and return the same."""
        return functional.tanh(x, self.mode, grad=self.grad, table=self.table)


class Sigmoid(Activation):
    """:func:`rarefy.act.sigmoid` as a module."""

    function = "sigmoid"

    def forward(self, x: Tensor) -> Tensor:
        """Take any shape and return the same."""
        return functional.sigmoid(x, self.mode, grad=self.grad, table=self.table)


class SiLU(Activation):
    """:func:`rarefy.act.silu` as a module; ``inplace`` writes the result over the input, as PyTorch's does."""

    function = "silu"

    def __init__(
        self,
        mode: str = "exact",
        *,
        inplace: bool = False,
        grad: str | None = None,
        table: Table | str | None = None,
    ) -> None:
        super().__init__(mode, grad=grad, table=table)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        """Take any shape and return the same."""
        if self.inplace:
            return functional.in_place(functional.silu, x, mode=self.mode, grad=self.grad, table=self.table)
        return functional.silu(x, self.mode, grad=self.grad, table=self.table)

    def extra_repr(self) -> str:
        """Return the options that are not the default."""
        return super().extra_repr() + (", inplace=True" if self.inplace else "")


class GELU(Activation):
    """:func:`rarefy.act.gelu` as a module; ``approximate`` is "none" or "tanh"."""

    function = "gelu"

    def __init__(
        self,
        mode: str = "exact",
        *,
        approximate: str = "none",
        grad: str | None = None,
        table: Table | str | None = None,
    ) -> None:
        super().__init__(mode, grad=grad, table=table)
        if approximate not in ("none", "tanh"):
            raise ValueError(f'approximate must be "none" or "tanh", got {approximate!r}')
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """Take any shape and return the same."""
        return functional.gelu(x, self.mode, approximate=self.approximate, grad=self.grad, table=self.table)
