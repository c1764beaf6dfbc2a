"""``verify``: a design against its software model, on every input, by simulation or by proof."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from rarefy import _checks
from rarefy.rtl import arguments
from rarefy.rtl.check.formal import prove
from rarefy.rtl.check.simulate import simulate
from rarefy.rtl.design import Design

#: What a unit may be verified by: two simulators, and a proof.
TOOLS = ("icarus", "verilator", "formal")
#: How many a simulation drives at least: all inputs of a narrow format several times, each time after others.
_WORDS = 4096


@dataclass(frozen=True)
class Mismatch:
    """An input, what the design gives (None for unknown bits, or for nothing) and what was expected, as patterns."""

    x: int
    y: int | None
    expected: int


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        design: name of the top module.
        tool: "icarus", "verilator" or "formal".
        statement: what was compared, in words.
        inputs: how many inputs that covers.
        mismatches: inputs whose result differs; a proof that fails counts one.
        first: the first of them, None without any; of a proof that fails, None where Yosys shows none.
        faults: breaches of the handshake (numbers lost, added, changed while they waited, late, or left over by a
            reset), of the clock (what changes elsewhere than at its rising edge), ports that are not the design's, or
            what a proof cannot see through.
        exceptions: inputs that the statement leaves out, in words.
        versions: of the tools.
        seconds: how long it took.

    """

    design: str
    tool: str
    statement: str
    inputs: int
    mismatches: int
    first: Mismatch | None
    faults: tuple[str, ...]
    exceptions: tuple[str, ...]
    versions: dict[str, str]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether nothing differs and no fault was seen."""
        return not self.mismatches and not self.faults

    def as_dict(self) -> dict[str, Any]:
        """Give everything as plain values, for JSON."""
        return {**asdict(self), "passed": self.passed}


def verify(design: Design, tool: str = "icarus", *, against: Design | None = None, seed: int = 0) -> Verification:
    """Compare a design with its software model.

    "icarus" and "verilator" simulate (cocotb): all inputs of a format of at most 16 bits, one a clock in a shuffled
    order, in every lane in another, and those of 8 bits 16 times over; of float32 every value of the high 16 bits, with
    random low bits. Inputs change between rising edges of the clock, too, where outputs of registers must not. Where
    there is a handshake both sides stall at random, and resets come while numbers are in flight; where nothing waits a
    number a clock must be taken, and come out after ``latency`` clocks; ``out_valid`` must not wait for ``out_ready``.
    A programmable table is written in a shuffled order over other words, and not where ``we`` is 0.

    "formal" proves equality on all inputs by Yosys (SAT; induction where there are registers): with the truth table of
    the model, in float32 with the table's definition written down row by row. What is undefined or floats equals
    nothing; other ports than the design's, latches, other clocks, the falling edge and what is set or reset without the
    clock are faults, and then no proof is tried. Of a handshake nothing waits (simulate its stalls): ``in_ready`` must
    be ``rst_n``, and ``out_valid`` 1 exactly ``latency`` clocks after a number was taken that no reset has dropped. A
    proof takes no programmable table.

    Args:
        design: what to verify.
        tool: "icarus", "verilator" or "formal".
        against: with "formal", prove equality with this design instead: one of the same format, or one of a narrower
            format with as many exponent bits, whose result must be the high bits of the wide one's.
        seed: of the shuffle, the stalls and the sample.

    Raises TypeError for what is no design, ValueError for a tool that is none or arguments that do not go together,
    MissingToolError, with what to install, when a tool is not there, and RuntimeError, with the tool's own lines, when
    it does not accept the design, or when a proof comes to no end.

    """
    arguments.design("verify", design)
    _checks.one_of("tool", tool, TOOLS)
    seed = arguments.seed(seed)
    if against is not None:
        arguments.design("verify", against, "against")
    if against is not None and tool != "formal":
        raise ValueError(f'against goes with tool="formal", got {tool!r}')
    began = time.perf_counter()
    found = _prove(design, against) if tool == "formal" else _simulate(design, tool, seed)
    return replace(found, seconds=time.perf_counter() - began)


def _prove(design: Design, against: Design | None) -> Verification:
    proof = prove(design, against)
    first = None if proof.counterexample is None else Mismatch(*proof.counterexample)
    every = 1 << design.format.bits
    return Verification(
        design.top, "formal", proof.statement, every, int(proof.refuted), first, proof.faults, proof.exceptions,
        proof.versions, 0.0
    )  # fmt: skip


def _simulate(design: Design, tool: str, seed: int) -> Verification:
    random = np.random.default_rng(seed)
    x, statement = _inputs(design, random)
    once = np.tile(np.arange(len(x))[:, None], design.lanes)
    order = np.concatenate([random.permuted(once, axis=0) for _ in range(max(1, _WORDS // len(x)))])
    answers = simulate(design, x[order], tool, seed)
    expected = design.compute(x).astype(np.int64)
    differs = answers.outputs != expected[order]
    wrong = np.unique(order[differs])
    first = None
    if wrong.size:
        i = int(wrong[0])
        y = int(answers.outputs[differs & (order == i)][0])
        first = Mismatch(int(x[i]), None if y < 0 else y, int(expected[i]))
    if design.lanes > 1:
        statement += f", in each of {design.lanes} lanes"
    if design.handshake:
        statement += f", with random stalls on both sides and resets in between (seed {seed})"
    return Verification(
        design.top, tool, statement, len(x), len(wrong), first, tuple(answers.faults), (), answers.versions, 0.0
    )


def _inputs(design: Design, random: np.random.Generator) -> tuple[npt.NDArray[np.int64], str]:
    fmt = design.format
    if fmt.bits > 16:
        low = fmt.bits - 16
        x = np.arange(1 << 16, dtype=np.int64) << low | random.integers(0, 1 << low, 1 << 16)
        return x, f"equal to the software model on a sample: every value of the high 16 bits of {fmt.name}"
    return fmt.all_bits().astype(np.int64), f"equal to the software model on all inputs of {fmt.name}"
