"""Peers and units of logic: the hardware equals the model on all 2^16 inputs, in one simulation of all of them."""

import subprocess
from dataclasses import replace

import numpy as np
import pytest

from rarefy import rtl
from rarefy.bench import rtl as peers
from rarefy.rtl import logic, search
from rarefy.rtl.eda import tools

pytestmark = pytest.mark.slow

BITS = np.arange(1 << 16)


def simulated(designs, folder):
    """What each design gives for every 16-bit pattern, -1 where a bit is unknown."""
    wires = "".join(f"  wire [15:0] y{i};\n  {d.top} u{i} (.x(x), .y(y{i}));\n" for i, d in enumerate(designs))
    formats = " ".join(["%h"] * len(designs))
    values = ", ".join(f"y{i}" for i in range(len(designs)))
    bench = f"""module bench;
  reg [15:0] x;
  integer i, file;
{wires}  initial begin
    file = $fopen("answers", "w");
    for (i = 0; i < 65536; i = i + 1) begin
      x = i[15:0];
      #1 $fdisplay(file, "{formats}", {values});
    end
    $finish;
  end
endmodule
"""
    (folder / "bench.sv").write_text("".join(d.text for d in designs) + bench)
    iverilog, vvp = (tools.program(name, "simulation") for name in ("iverilog", "vvp"))
    subprocess.run([iverilog, "-g2012", "-o", "bench", "bench.sv"], cwd=folder, check=True)
    subprocess.run([vvp, "bench"], cwd=folder, check=True, capture_output=True)
    rows = (folder / "answers").read_text().split()
    numbers = [int(word, 16) if set(word) <= set("0123456789abcdef") else -1 for word in rows]
    return np.array(numbers).reshape(len(BITS), len(designs)).T


def test_every_peer_unit_and_searched_table_equals_its_model(tmp_path):
    designs = [make() for make in peers.PEERS.values()]
    designs += [logic.load(name).design() for name in logic.names()]
    table = search.tables(error=0.00892, rows=(128,))[0]
    designs += [rtl.emit(table, nan="quiet", top="searched")]
    mutant = peers.constants(64)
    constant = mutant.text.index("6'd5: rom = 15'd") + len("6'd5: rom = 15'd16")
    changed = mutant.text[:constant] + str((int(mutant.text[constant]) + 1) % 10) + mutant.text[constant + 1 :]
    designs += [replace(mutant, top="mutant", text=changed.replace("module constants64", "module mutant"))]
    assert len({d.top for d in designs}) == len(designs)
    answers = simulated(designs, tmp_path)
    differing = {d.top: int((got != d.compute(BITS)).sum()) for d, got in zip(designs, answers, strict=True)}
    # one constant of 64 is wrong: eight mantissas of either sign
    assert differing.pop("mutant") == 16
    assert set(differing.values()) == {0}


@pytest.mark.parametrize("make", [peers.hard_tanh, peers.fixed_point])
def test_verify_takes_peers(make):
    found = rtl.verify(make())
    assert found.passed
    assert found.inputs == 1 << 16
