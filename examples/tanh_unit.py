"""SystemVerilog of tanh units, and what their software models say: python examples/tanh_unit.py FOLDER."""

import sys

import numpy as np

from rarefy import act, rtl
from rarefy.rtl import logic

every = np.arange(65536)  # bit patterns of bfloat16

# The published table as a pipeline of two stages, valid and ready on both sides, four numbers a clock.
table = act.load("tanh_bf16_ktanh")
pipeline = rtl.emit(table, stages=2, handshake=True, lanes=4)
pipeline.save(f"{sys.argv[1]}/tanh_pipeline.sv")

# A unit of logic that keeps an error bound and nothing else: fewer gates.
searched = logic.load("tanh_bf16_area_00892").design()
searched.save(f"{sys.argv[1]}/tanh_searched.sv")

for name, design in {"K-TanH": pipeline, "searched": searched}.items():
    print(f"{name}: largest error {design.about.max_abs:.5f}, {design.latency} clocks")

assert np.array_equal(pipeline.compute(every), table.compute(every))
# With Icarus Verilog rtl.verify(pipeline) compares all of them in simulation; rtl.synth(pipeline) counts gates.
