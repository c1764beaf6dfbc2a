"""Units of pure logic, without table or adder: the shipped ones by name, and how one is made from sums of products."""

from rarefy.rtl.logic.unit import LogicSpec, LogicUnit, load, names

__all__ = ["LogicSpec", "LogicUnit", "load", "names"]
