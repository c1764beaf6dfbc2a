"""Methods x targets x seeds on one task: ``rarefy compare FILE`` ends in a table.

::

    comparison = rarefy.compare.load(Path("recipes/compare-fashion-mnist.yaml"))
    rarefy.compare.run(comparison, Path("runs/compare"))      # resumable: finished runs are kept
    rows = rarefy.compare.rows(comparison, Path("runs/compare"))
"""

try:
    from rarefy.compare.plan import Comparison, Job, load
    from rarefy.compare.runner import run
    from rarefy.compare.table import rows, write_csv
except ModuleNotFoundError as missing:
    if (missing.name or "").startswith("rarefy"):
        raise
    raise ImportError(f"rarefy.compare needs {missing.name}: pip install 'rarefy[train]'") from missing

__all__ = ["Comparison", "Job", "load", "rows", "run", "write_csv"]
