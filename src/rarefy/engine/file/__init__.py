"""An engine in one file: written whole or not at all, checked before anything of it is used.

    bytes 0 to 63     magic, version, size of the file, size of the header, SHA-256 of what follows
    from 64           the header, JSON: inputs and outputs, items in order, facts for the profile
    then              native programs and tensors, each at a multiple of 64

A native program has a checksum of its own in its first 64 bytes, which the native engine compares: of a program the
SHA-256 is of these alone, so that its weights are read once and not twice.

Nothing in a file is code: steps that PyTorch runs are named operators with plain arguments, which
:func:`rarefy.engine.dry_run.check_target` allows or refuses, and all steps are run dry, on shapes alone, when it is
loaded. Whoever can write a file can still make it compute something else.
"""

from rarefy.engine.file.reading import load
from rarefy.engine.file.writing import save

__all__ = ["load", "save"]
