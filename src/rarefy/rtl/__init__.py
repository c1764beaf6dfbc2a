"""Hardware from tables: SystemVerilog, verified on all inputs, and what it costs in open tools."""

from rarefy.rtl.design import About, Design, Port
from rarefy.rtl.emit import STYLES, emit
from rarefy.rtl.fpga import Placement, place
from rarefy.rtl.search import Found, smallest
from rarefy.rtl.synth import SCRIPTS, Synthesis, synth
from rarefy.rtl.tools import MissingToolError
from rarefy.rtl.verify import TOOLS, Mismatch, Verification, verify

__all__ = [
    "SCRIPTS",
    "STYLES",
    "TOOLS",
    "About",
    "Design",
    "Found",
    "Mismatch",
    "MissingToolError",
    "Placement",
    "Port",
    "Synthesis",
    "Verification",
    "emit",
    "place",
    "smallest",
    "synth",
    "verify",
]
