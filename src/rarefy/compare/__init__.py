"""Methods x targets x seeds on one task: ``rarefy compare FILE`` ends in a table and a page.

::

    comparison = rarefy.compare.load(Path("recipes/compare-fashion-mnist.yaml"))
    rarefy.compare.run(comparison, Path("runs/compare"))      # resumable: finished runs are kept
    rarefy.compare.write(comparison, Path("runs/compare"))    # -> compare.csv and compare.html there
"""

try:
    from rarefy.compare.page import write
    from rarefy.compare.plan import Comparison, Job, load
    from rarefy.compare.runner import run
    from rarefy.compare.table import rows, write_csv
except ModuleNotFoundError as missing:
    if (missing.name or "").startswith("rarefy"):
        raise
    raise ImportError(f"rarefy.compare needs {missing.name}: pip install 'rarefy[train]'") from missing

__all__ = ["Comparison", "Job", "load", "rows", "run", "write", "write_csv"]
