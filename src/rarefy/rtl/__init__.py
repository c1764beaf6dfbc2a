"""Hardware from tables: SystemVerilog, verified on all inputs, and what it costs in open tools."""

from rarefy.rtl.check.verify import TOOLS, Mismatch, Verification, verify
from rarefy.rtl.design import About, Design, Port
from rarefy.rtl.eda.fpga import Placement, place
from rarefy.rtl.eda.synth import SCRIPTS, Synthesis, synth
from rarefy.rtl.eda.tools import MissingToolError
from rarefy.rtl.emit import STYLES, emit
from rarefy.rtl.search import Found, smallest

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
