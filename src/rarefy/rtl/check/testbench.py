"""The testbench of :mod:`rarefy.rtl.check.simulate`: cocotb runs it in the simulator that it builds and starts.

It reads a plan (JSON), drives every word of it into the design and writes down what came out; what should have come
out is judged elsewhere. It imports nothing of rarefy, so that a simulator starts in a moment.
"""

import json
import os
import random
import sys
from collections import deque
from pathlib import Path
from typing import Any

import cocotb
from cocotb.triggers import Timer
from cocotb_tools.runner import get_runner

PLAN = "RAREFY_RTL_PLAN"
RESETS = 48  # in the middle of a run, at least


def start(path: Path) -> None:
    """Build the design of a plan and run this file inside the simulator; everything stays in the plan's folder."""
    plan = json.loads(path.read_text())
    folder = path.parent
    runner = get_runner(plan["tool"])
    runner.build(
        sources=[folder / "design.sv"],
        hdl_toplevel=plan["top"],
        build_dir=folder / "build",
        build_args=plan["build_args"],
        timescale=("1ns", "1ns"),
        log_file=folder / "build.log",
    )
    runner.test(
        test_module=Path(__file__).stem,
        hdl_toplevel=plan["top"],
        build_dir=folder / "build",
        test_dir=folder,
        extra_env={PLAN: str(path)},
        log_file=folder / "test.log",
    )


def number(value: Any) -> int | str:
    """Read a port as a number, or, where a bit of it is unknown, its bits as text."""
    text = str(value)
    return int(text, 2) if set(text) <= {"0", "1"} else text


@cocotb.test()
async def bench(dut: Any) -> None:
    """Drive the words of the plan, in their order, and write the outputs beside it."""
    path = Path(os.environ[PLAN])
    plan = json.loads(path.read_text())
    tick = Timer(1, "ns")
    if plan["clock"]:
        dut.clk.value = 0
    if plan["handshake"]:
        dut.rst_n.value, dut.in_valid.value, dut.out_ready.value = 0, 0, 0
        await clock(dut, tick, 2)
        dut.rst_n.value = 1
    for address, word in plan["setup"]:
        dut.we.value, dut.wa.value, dut.wd.value = 1, address, word
        await clock(dut, tick)
    if plan["setup"]:
        dut.we.value = 0
    outputs: list[int | str | None]
    if plan["handshake"]:
        outputs, faults = await stalled(dut, tick, plan["words"], random.Random(plan["seed"]))
    else:
        outputs, faults = list(await steady(dut, tick, plan["words"], plan["latency"])), []
    (path.parent / "outputs.json").write_text(json.dumps({"outputs": outputs, "faults": faults}))


async def clock(dut: Any, tick: Timer, times: int = 1) -> None:
    """Give rising edges, with the inputs as they stand."""
    for _ in range(times):
        await tick
        dut.clk.value = 1
        await tick
        dut.clk.value = 0


async def steady(dut: Any, tick: Timer, words: list[int], latency: int) -> list[int | str]:
    """Drive a word every clock, or, where there is no register between, every tick."""
    outputs: list[int | str] = []
    x, y = dut.x, dut.y
    for cycle in range(len(words) + latency):
        x.value = words[cycle] if cycle < len(words) else 0
        await tick
        if cycle >= latency:
            outputs.append(number(y.value))
        if latency:
            dut.clk.value = 1
            await tick
            dut.clk.value = 0
    return outputs


async def stalled(
    dut: Any, tick: Timer, words: list[int], chance: random.Random
) -> tuple[list[int | str | None], list[str]]:
    """Let both sides wait at random; what waits at the output must stay, and nothing may be lost, added or stuck.

    The rates change every 64 clocks, so that full, empty and bursty pipelines occur. Again and again a reset comes
    while numbers are in flight: during it nothing may be taken, nor given from its first edge on, and what was in
    flight never comes out; it is sent again.
    """
    outputs: list[int | str | None] = [None] * len(words)
    faults: list[str] = []
    pending, flight = deque(range(len(words))), deque[int]()
    waiting, offered, resets, left, cycle, send, take = None, False, 0, 0, 0, 1.0, 1.0
    limit = 64 * len(words) + 20000
    while (pending or flight or left or resets < RESETS) and cycle < limit and len(faults) < 16:
        if not pending and resets < RESETS:
            pending.append(chance.randrange(len(words)))
        if cycle % 64 == 0:
            send, take = chance.choice((0.2, 0.7, 1.0)), chance.choice((0.0, 0.2, 0.7, 1.0))
        first = not left and bool(flight) and chance.random() < (1 / 16 if resets < RESETS else 1 / 1024)
        if first:
            left, resets = chance.choice((1, 1, 2, 3)), resets + 1
        offered = bool(pending) and (offered or chance.random() < send)
        taking = chance.random() < take
        dut.rst_n.value, dut.in_valid.value, dut.out_ready.value = int(not left), int(offered), int(taking)
        dut.x.value = words[pending[0]] if offered else 0
        await tick
        ready, valid = number(dut.in_ready.value), number(dut.out_valid.value)
        if {ready, valid} - {0, 1}:
            faults.append(f"clock {cycle}: in_ready is {ready} and out_valid {valid}")
        if left:
            if ready != 0:
                faults.append(f"clock {cycle}: in_ready is not 0 during reset")
            if valid != 0 and not first:
                faults.append(f"clock {cycle}: out_valid is not 0 after the first clock of a reset")
            pending.extendleft(reversed(flight))
            flight.clear()
            waiting, offered, left = None, False, left - 1
        else:
            out = number(dut.y.value) if valid == 1 else None
            if waiting is not None and out != waiting:
                faults.append(f"clock {cycle}: the output changed from {waiting} to {out} while it waited")
            waiting = out if not taking else None
            if out is not None and not flight:
                faults.append(f"clock {cycle}: the output gives {out}, which nothing was sent for since the last reset")
            elif out is not None and taking:
                index = flight.popleft()
                if outputs[index] not in (None, out):
                    faults.append(f"clock {cycle}: {words[index]:#x} gives {out}, and gave {outputs[index]} before")
                outputs[index] = out
            if offered and ready == 1:
                flight.append(pending.popleft())
                offered = False
        dut.clk.value = 1
        await tick
        dut.clk.value = 0
        cycle += 1
    if missing := outputs.count(None):
        faults.append(f"after {cycle} clocks {len(words) - missing} of {len(words)} words had come out")
    return outputs, faults[:16]


if __name__ == "__main__":
    start(Path(sys.argv[1]))
