"""The native kernels: `librarefy` loaded by ctypes, and what this CPU can run of it.

The library holds one table of kernels; :func:`table` is that table, and :func:`find` picks the best entry of a name.
When the library is missing (no compiler when the package was built) both come back empty and callers run in PyTorch.
"""

from rarefy.kernels._library import ENVIRONMENT, Kernel, chain, find, forced, in_use, isa, library_path, table
from rarefy.kernels._memory import address

__all__ = ["ENVIRONMENT", "Kernel", "address", "chain", "find", "forced", "in_use", "isa", "library_path", "table"]
