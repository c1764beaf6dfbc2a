"""The figures of the activation functions: ``python benchmarks/act.py`` writes results/act.csv."""

import sys
from pathlib import Path

from rarefy.act import bench

if __name__ == "__main__":
    sys.exit(bench.main(["--csv", str(Path(__file__).parents[1] / "results" / "act.csv"), *sys.argv[1:]]))
