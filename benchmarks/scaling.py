"""ResNet-50 on several H100s, on paper: `rarefy plan`'s formula with the step times in results/gpu.csv.

    python benchmarks/scaling.py --bandwidth 50

Every GPU takes a batch of 256, as it was measured on one: the global batch grows with their number. Nothing here was
run on several GPUs. A step is the one that was measured and the gradients' exchange after it, nothing overlapped; the
images that this takes a second are what loaders must give for it to be so.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from rarefy.train.plan import exchange

RESULTS = Path(__file__).parent.parent / "results" / "gpu.csv"
PARAMETERS, BATCH, IMAGES, EPOCHS = 25_557_032, 256, 1_281_167, 90


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", type=float, default=50.0, help="GB/s of each GPU to the others; default 50")
    parser.add_argument("--method", default="autosparse", help="a method in results/gpu.csv")
    arguments = parser.parse_args()
    rows = list(csv.DictReader(RESULTS.read_text().splitlines()))
    [row] = [
        row
        for row in rows
        if (row["network"], row["method"], row["compiled"]) == (f"ResNet-50, batch {BATCH}", arguments.method, "False")
    ]
    step = float(row["method_ms"]) / 1e3
    print(f"{arguments.method}, {1e3 * step:.2f} ms a step on one {row['gpu']}, {arguments.bandwidth:g} GB/s")
    print("| GPUs | exchange, ms | step, ms | images a second | 90 epochs, hours | of N times one |")
    print("|---:|---:|---:|---:|---:|---:|")
    for devices in (1, 8, 64, 512):
        exchanged = exchange(devices, 4 * PARAMETERS, arguments.bandwidth)
        whole = step + exchanged
        steps = EPOCHS * (IMAGES // (BATCH * devices))
        print(
            f"| {devices} | {1e3 * exchanged:.2f} | {1e3 * whole:.2f} | {devices * BATCH / whole:,.0f} "
            f"| {steps * whole / 3600:.2f} | {step / whole:.1%} |"
        )


if __name__ == "__main__":
    main()
