"""A run's folder as one self-contained HTML page: what came out, how it went, what was counted and how it was run.

::

    rarefy.report.write(Path("runs/autosparse"), baseline=Path("runs/dense"))  # -> runs/autosparse/report.html

The page needs no network and no other file. :func:`load` reads the same folder into typed records.
"""

try:
    from rarefy.report.page import write
    from rarefy.report.reading import RunError, load
    from rarefy.report.run import Run
except ModuleNotFoundError as missing:
    if (missing.name or "").startswith("rarefy"):
        raise
    raise ImportError(f"rarefy.report needs {missing.name}: pip install 'rarefy[train]'") from missing

__all__ = ["Run", "RunError", "load", "write"]
