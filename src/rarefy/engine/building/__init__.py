"""Steps of a plan that follow each other as native programs (:mod:`rarefy.engine.builder` makes these).

:class:`Building` takes steps one after the other; how each is added is in ``layers``, ``arithmetic``, ``moving`` and
``places``, as the kinds of steps are in :mod:`rarefy.engine.plan`, and what these find of the program so far in
``draft``. It gives a :class:`NativeSegment`.
"""

from rarefy.engine.building.building import Building
from rarefy.engine.building.draft import CannotError, Options, laid
from rarefy.engine.building.segments import INTEGERS, NativeSegment, SegmentPort, samples

__all__ = ["INTEGERS", "Building", "CannotError", "NativeSegment", "Options", "SegmentPort", "laid", "samples"]
