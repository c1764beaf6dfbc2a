"""What may enter SystemVerilog from outside: names of modules, and text of comments.

A table's file is somebody else's. Its name and a command become a comment of printable characters, on a line of its
own and never at its beginning, where tools look for their directives; the name of a module is an identifier that no
tool reads as a keyword.
"""

from __future__ import annotations

import re

_LONGEST = 128
#: Keywords of IEEE 1800-2017, those of Verilog among them.
_STANDARD = """
accept_on alias always always_comb always_ff always_latch and assert assign assume automatic before begin bind bins
binsof bit break buf bufif0 bufif1 byte case casex casez cell chandle checker class clocking cmos config const
constraint context continue cover covergroup coverpoint cross deassign default defparam design disable dist do edge else
end endcase endchecker endclass endclocking endconfig endfunction endgenerate endgroup endinterface endmodule endpackage
endprimitive endprogram endproperty endsequence endspecify endtable endtask enum event eventually expect export extends
extern final first_match for force foreach forever fork forkjoin function generate genvar global highz0 highz1 if iff
ifnone ignore_bins illegal_bins implements implies import incdir include initial inout input inside instance int integer
interconnect interface intersect join join_any join_none large let liblist library local localparam logic longint
macromodule matches medium modport module nand negedge nettype new nexttime nmos nor noshowcancelled not notif0 notif1
null or output package packed parameter pmos posedge primitive priority program property protected pull0 pull1 pulldown
pullup pulsestyle_ondetect pulsestyle_onevent pure rand randc randcase randsequence rcmos real realtime ref reg
reject_on release repeat restrict return rnmos rpmos rtran rtranif0 rtranif1 s_always s_eventually s_nexttime s_until
s_until_with scalared sequence shortint shortreal showcancelled signed small soft solve specify specparam static string
strong strong0 strong1 struct super supply0 supply1 sync_accept_on sync_reject_on table tagged task this throughout time
timeprecision timeunit tran tranif0 tranif1 tri tri0 tri1 triand trior trireg type typedef union unique unique0 unsigned
until until_with untyped use uwire var vectored virtual void wait wait_order wand weak weak0 weak1 while wildcard wire
with within wor xnor xor
"""
#: What Icarus Verilog, Verilator (C++) and Yosys keep for themselves besides.
_TOOLS = "bool wone wreal discipline nature enddiscipline endnature std work"
RESERVED = frozenset(f"{_STANDARD} {_TOOLS}".split())


def module_name(name: object, what: str) -> str:
    """Give ``name``, if a module can be called that; raises ValueError, calling it ``what``, if not."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"{what} must be a name of letters, digits and underscores, got {name!r}")
    if len(name) > _LONGEST:
        raise ValueError(f"{what} must be a name of at most {_LONGEST} characters, got {len(name)}")
    if name in RESERVED:
        raise ValueError(f"{what} must not be a reserved word of SystemVerilog, got {name!r}: give another name as top")
    return name


def comment(text: str) -> str:
    """Make ``text`` part of a comment of one line: ``?`` for what is not printable ASCII, backslash and backtick."""
    return re.sub(r"[^ -~]|[\\`]", "?", text)
