"""The testbench of :mod:`rarefy.rtl.check.simulate`: cocotb runs it in the simulator that it builds and starts.

It reads a plan (JSON), drives every word of it into the design and writes down what came out; what should have come
out is judged elsewhere. It imports nothing of rarefy, so that a simulator starts in a moment.
"""

import json
import os
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
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
    words = [int(word, 16) for word in plan["words"]]
    faults = list(misfits(dut, plan["ports"]))
    outputs: list[int | str | None] = [None] * len(words)
    if not faults:
        outputs, faults = await driven(dut, plan, words)
    written = {
        "outputs": [f"{y:x}" if isinstance(y, int) else None for y in outputs],
        "unknown": {index: y for index, y in enumerate(outputs) if isinstance(y, str)},
        "faults": faults[:16],
    }
    (path.parent / "outputs.json").write_text(json.dumps(written))


def misfits(dut: Any, ports: dict[str, int]) -> Iterator[str]:
    """Say which ports the design has not, or in another width."""
    for name, width in ports.items():
        port = getattr(dut, name, None)
        found = 0 if port is None else len(str(port.value))
        if found != width:
            yield f"port {name} is {f'of {found} bits' if found else 'missing'}, the design's is of {width} bits"


async def driven(dut: Any, plan: dict[str, Any], words: list[int]) -> tuple[list[int | str | None], list[str]]:
    """Drive words as the design takes them; gives what came out, and what was wrong on the way."""
    tick, chance = Timer(1, "ns"), random.Random(plan["seed"])
    if plan["clock"]:
        dut.clk.value = 0
    if plan["handshake"]:
        dut.rst_n.value, dut.in_valid.value, dut.out_ready.value = 0, 0, 0
        for _ in range(2):
            await tick
            dut.clk.value = 1
            await tick
            dut.clk.value = 0
        dut.rst_n.value = 1
    if plan["setup"]:
        await write(dut, tick, dict(plan["setup"]), chance)

    def disturb() -> None:
        """Drive what has no effect: a word for the table, without write enable."""
        if plan["setup"]:
            any_word(dut, chance)

    if plan["handshake"]:
        return await stalled(dut, tick, words, plan["latency"], chance, disturb)
    if plan["clock"]:
        return await steady(dut, tick, words, plan["latency"], chance, disturb)
    return await combinational(dut, tick, words), []


def any_word(dut: Any, chance: random.Random) -> None:
    """Offer the table some word at some address."""
    dut.wa.value, dut.wd.value = chance.getrandbits(len(dut.wa)), chance.getrandbits(len(dut.wd))


async def write(dut: Any, tick: Timer, table: dict[int, int], chance: random.Random) -> None:
    """Write any words everywhere, then those of the table, each in a shuffled order and between others not enabled.

    Addresses that the table has not are written with any words both times: that must not touch those that it has.
    """
    width, addresses = len(dut.wd), list(range(1 << len(dut.wa)))
    first = {address: chance.getrandbits(width) for address in addresses}
    for words in (first, first | table):
        chance.shuffle(addresses)
        for address in addresses:
            for enable in (1, 0):
                dut.we.value = enable
                if enable:
                    dut.wa.value, dut.wd.value = address, words[address]
                else:
                    any_word(dut, chance)
                await tick
                dut.clk.value = 1
                await tick
                dut.we.value = 1 - enable  # no matter what, up to the next rising edge
                any_word(dut, chance)
                await tick
                dut.clk.value = 0
                await tick
    dut.we.value = 0


async def combinational(dut: Any, tick: Timer, words: list[int]) -> list[int | str | None]:
    """Drive a word every tick."""
    outputs: list[int | str | None] = []
    for word in words:
        dut.x.value = word
        await tick
        outputs.append(number(dut.y.value))
    return outputs


async def steady(
    dut: Any, tick: Timer, words: list[int], latency: int, chance: random.Random, disturb: Callable[[], None]
) -> tuple[list[int | str | None], list[str]]:
    """Drive a word every clock, and after the rising edge another, which counts for nothing where there are registers.

    From one rising edge to the next the output of a register stands; what is combinational does not see the clock.
    """
    outputs: list[int | str | None] = []
    faults: list[str] = []
    x, y = dut.x, dut.y
    stood = None
    for cycle in range(len(words) + latency):
        x.value = words[cycle] if cycle < len(words) else 0
        disturb()
        await tick
        before = str(y.value)
        if cycle >= latency:
            outputs.append(number(before))
            if latency and before != stood:
                faults.append(f"clock {cycle}: the output changed from {stood} to {before} after the rising edge")
        dut.clk.value = 1
        await tick
        stood = str(y.value)
        if not latency and before != stood:
            faults.append(f"clock {cycle}: the output changed from {before} to {stood} with the clock")
        if latency:
            x.value = chance.choice(words)
        await tick
        dut.clk.value = 0
    return outputs, faults


async def stalled(
    dut: Any, tick: Timer, words: list[int], latency: int, chance: random.Random, disturb: Callable[[], None]
) -> tuple[list[int | str | None], list[str]]:
    """Let both sides wait at random; what waits at the output must stay, and nothing may be lost, added or stuck.

    The rates change every 64 clocks, so that full, empty and bursty pipelines occur; every fourth time nothing waits.
    When the taker has taken for a while a number a clock must be taken in, and come out ``latency`` clocks later. After
    each rising edge the inputs change, which the outputs of registers must not see, ``out_ready`` among them, and
    sometimes ``rst_n``, which is back before the next edge. Again and again a reset comes while numbers are in flight:
    during it nothing may be taken, nor given from its first edge on, and what was in flight never comes out; it is sent
    again.
    """
    outputs: list[int | str | None] = [None] * len(words)
    faults: list[str] = []
    pending, flight = deque(range(len(words))), deque[tuple[int, int]]()
    waiting, stood, offered, resets, left, cycle, send, take = None, None, False, 0, 0, 0, 1.0, 1.0
    streak, settled = 0, 2 * latency + 2  # clocks that the taker has taken at; after how many nothing waits
    limit = 64 * len(words) + 20000
    while (pending or flight or left or resets < RESETS) and cycle < limit and len(faults) < 16:
        if not pending and resets < RESETS:
            pending.append(chance.randrange(len(words)))
        flowing = cycle % 256 < 64
        if cycle % 64 == 0:
            send, take = chance.choice((0.2, 0.7, 1.0)), chance.choice((0.0, 0.2, 0.7, 1.0))
            send, take = (1.0, 1.0) if flowing else (send, take)
        rate = 1 / 16 if resets < RESETS and not flowing else 1 / 1024
        first = not left and bool(flight) and chance.random() < rate
        if first:
            left, resets = chance.choice((1, 1, 2, 3)), resets + 1
        offered = bool(pending) and (offered or chance.random() < send)
        taking = chance.random() < take
        running = int(not left)
        dut.rst_n.value, dut.in_valid.value, dut.out_ready.value = running, int(offered), int(taking)
        dut.x.value = words[pending[0]] if offered else 0
        disturb()
        await tick
        ready, (valid, out) = number(dut.in_ready.value), given(dut)
        if {ready, valid} - {0, 1}:
            faults.append(f"clock {cycle}: in_ready is {ready} and out_valid {valid}")
        if not first and stood not in (None, (valid, out)):
            faults.append(f"clock {cycle}: out_valid or y changed with the inputs, not with the clock")
        streak = 0 if left or not taking else streak + 1
        if left:
            if ready != 0:
                faults.append(f"clock {cycle}: in_ready is not 0 during reset")
            if valid != 0 and not first:
                faults.append(f"clock {cycle}: out_valid is not 0 after the first clock of a reset")
            pending.extendleft(index for index, _ in reversed(flight))
            flight.clear()
            waiting, offered, left = None, False, left - 1
        else:
            if streak > settled and ready != 1:
                faults.append(f"clock {cycle}: in_ready is 0, though nothing waits")
            if waiting is not None and out != waiting:
                faults.append(f"clock {cycle}: the output changed from {waiting} to {out} while it waited")
            waiting = out if not taking else None
            if out is not None and (not flight or cycle - flight[0][1] < latency):
                sent_for = f"nothing was sent for since the last reset, at least {latency} clocks before"
                faults.append(f"clock {cycle}: the output gives {out}, which {sent_for}")
            elif out is not None and taking:
                index, sent = flight.popleft()
                took = cycle - sent
                if took > latency and streak > settled + took:
                    faults.append(f"clock {cycle}: {words[index]:#x} took {took} clocks, not {latency}")
                if outputs[index] not in (None, out):
                    faults.append(f"clock {cycle}: {words[index]:#x} gives {out}, and gave {outputs[index]} before")
                outputs[index] = out
            if offered and ready == 1:
                flight.append((pending.popleft(), cycle))
                offered = False
        dut.clk.value = 1
        await tick
        stood = given(dut)
        dut.in_valid.value, dut.out_ready.value, dut.x.value = (
            chance.getrandbits(1),
            int(not taking),
            words[cycle % len(words)],
        )
        if chance.random() < 1 / 8:
            dut.rst_n.value = 1 - running
            await tick
            dut.rst_n.value = running
        await tick
        if given(dut) != stood:
            faults.append(f"clock {cycle}: out_valid or y changed with the inputs, not with the clock")
        dut.clk.value = 0
        cycle += 1
    if missing := outputs.count(None):
        faults.append(f"after {cycle} clocks {len(words) - missing} of {len(words)} words had come out")
    return outputs, faults


def given(dut: Any) -> tuple[int | str, int | str | None]:
    """Read ``out_valid``, and ``y`` where that is 1."""
    valid = number(dut.out_valid.value)
    return valid, number(dut.y.value) if valid == 1 else None


if __name__ == "__main__":
    start(Path(sys.argv[1]))
