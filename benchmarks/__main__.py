"""`python -m benchmarks`: every race, and benchmarks/RESULTS.md written anew; --small: a tiny one, only printed."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from . import report, store

RESULTS = Path(__file__).parent / "RESULTS.md"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--small", action="store_true", help="tiny data, a few seconds, RESULTS.md left alone"
    )
    small = parser.parse_args().small
    load_before = os.getloadavg()[0]
    # TMPDIR= says on which disk; it must be one, not memory, for fsync to cost what it costs
    with tempfile.TemporaryDirectory(prefix="vacli-benchmarks-") as folder:
        results = []
        for result in store.races(Path(folder), store.SMALL if small else store.FULL):
            print(f"measured: {result.title}", file=sys.stderr)
            results.append(result)
        text = report.write(results, Path(folder), load_before)
    print(text)
    if not small:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
