"""Hardware from tables: SystemVerilog, verified on all inputs."""

from rarefy.rtl.design import About, Design, Port
from rarefy.rtl.emit import STYLES, emit
from rarefy.rtl.tools import MissingToolError
from rarefy.rtl.verify import TOOLS, Mismatch, Verification, verify

__all__ = [
    "STYLES",
    "TOOLS",
    "About",
    "Design",
    "Mismatch",
    "MissingToolError",
    "Port",
    "Verification",
    "emit",
    "verify",
]
