"""``Design``: one module of hardware, with the software model that it must equal bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from rarefy._files import write_atomically
from rarefy.act.spec.formats import Format
from rarefy.act.spec.table import Table
from rarefy.rtl.identifiers import module_name

Compute: TypeAlias = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


@dataclass(frozen=True)
class Port:
    """A port of a module: its name, "input" or "output", and its width in bits."""

    name: str
    direction: Literal["input", "output"]
    width: int


@dataclass(frozen=True)
class About:
    """What a design stands for: for headers, messages and result files.

    Attributes:
        name: the table, or the peer, that it was made from.
        function: the function that it approximates ("tanh", "sigmoid", "silu", "gelu", ...).
        max_abs: its largest absolute error over all inputs, None where it is not known.
        command: what makes it again, "" where no command does.
        details: what else a result file should say of it, for example ``{"style": "flat"}``.

    """

    name: str
    function: str
    max_abs: float | None = None
    command: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Design:
    """SystemVerilog of one top module, and ``compute``, the software model of it.

    Ports, in this order where they exist:

    ``clk``
        clock, rising edge; only where there is state.
    ``rst_n``
        reset, active low, sampled at the clock: what is in flight is dropped (only with ``handshake``). While it is 0
        ``in_ready`` is 0, and from the first clock edge on ``out_valid`` is, so that nothing is transferred.
    ``we``, ``wa``, ``wd``
        write port of a programmable table: the word ``wd`` goes to address ``wa`` at the clock.
    ``in_valid``, ``in_ready``, ``out_valid``, ``out_ready``
        a transfer happens at a clock edge where valid, ready and ``rst_n`` are 1 (only with ``handshake``).
    ``x``, ``y``
        ``lanes`` numbers each, lane 0 in the lowest bits; bit patterns of ``format``.

    Without ``handshake`` every clock takes an ``x``, whose ``y`` stands at the output ``latency`` clock edges later.

    Attributes:
        top: name of the top module.
        text: the SystemVerilog, complete.
        format: format of the numbers in ``x`` and ``y``.
        latency: clock edges from ``x`` to ``y``; 0 is combinational.
        ports: the ports of ``top``.
        compute: from an array of bit patterns (one number each, any shape) to the patterns of the results.
        about: what it stands for.
        lanes: how many numbers ``x`` and ``y`` carry.
        handshake: whether the four valid/ready ports are there.
        clock: name of the clock port, None without one.
        table: the table that it was made from, None for a peer.
        nan: what a NaN gives: "keep", "quiet" or "none", as in :func:`rarefy.rtl.emit`.
        setup: the words (address, data) that ``compute`` takes to have been written to the table.

    Raises ValueError for a ``top`` that is no name of a module, a reserved word of SystemVerilog or a port.

    """

    top: str
    text: str
    format: Format
    latency: int
    ports: tuple[Port, ...]
    compute: Compute
    about: About
    lanes: int = 1
    handshake: bool = False
    clock: str | None = None
    table: Table | None = None
    nan: str = "keep"
    setup: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        module_name(self.top, "top")
        if self.port(self.top) is not None:
            raise ValueError(f"top must not be the name of a port, got {self.top!r}: give another name as top")

    def port(self, name: str) -> Port | None:
        """Find the port of this name, or None."""
        return next((p for p in self.ports if p.name == name), None)

    def save(self, path: str | Path) -> None:
        """Write the text to a file: beside it first, then renamed, so that no half-written file is left."""
        write_atomically(Path(path), lambda beside: beside.write_text(self.text, encoding="utf-8"))


def literal(width: int, value: int | np.integer[Any]) -> str:
    """Write a literal of a width: ``literal(15, 0x3e80)`` is ``15'h3e80``; one bit is ``1'b0`` or ``1'b1``."""
    v = int(value) & ((1 << width) - 1)
    return f"1'b{v}" if width == 1 else f"{width}'h{v:0{(width + 3) // 4}x}"
