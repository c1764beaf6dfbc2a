"""Hardware from tables: SystemVerilog, verified on all inputs."""

from rarefy.rtl.design import About, Design, Port
from rarefy.rtl.emit import STYLES, emit

__all__ = ["STYLES", "About", "Design", "Port", "emit"]
