"""Fit tables: from the true function to the interval of answers allowed for every input, and from there to rows.

Everything here is deterministic and exhaustive over the inputs of the format. ``fit_shift`` searches every (E, r, b)
of every row, so that its optimum is a proof; ``fit_linear`` and ``fit_segments`` decide by exact integer arithmetic
whether a straight line passes through all intervals of a row.
"""

from rarefy.act.fit.lines import fit_linear, fit_segments
from rarefy.act.fit.shift import OBJECTIVES, Certificate, certify, fit_shift

__all__ = ["OBJECTIVES", "Certificate", "certify", "fit_linear", "fit_segments", "fit_shift"]
