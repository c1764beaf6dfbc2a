"""The figures of the activation functions: ``python benchmarks/act.py`` writes results/act.csv."""

import sys
from pathlib import Path

from rarefy.cli import main

if __name__ == "__main__":
    target = Path(__file__).parents[1] / "results" / "act.csv"
    sys.exit(main(["bench", "act", "--csv", str(target), *sys.argv[1:]]))
