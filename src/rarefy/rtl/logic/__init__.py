"""Units of pure logic, without table or adder: the shipped ones by name, and how one is made from sums of products."""

from rarefy.rtl.logic.unit import Frame, Unit, load, names

__all__ = ["Frame", "Unit", "load", "names"]
