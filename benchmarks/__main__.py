"""`python -m benchmarks [PART ...]`: measures, and writes these parts of RESULTS.md anew; --small: tiny, printed."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from . import (
    ablation,
    decoding,
    epoch,
    extraction,
    faces,
    gather,
    live,
    pretraining,
    report,
    scan,
    store,
    studyforrest,
)
from .race import Result

RESULTS = Path(__file__).parent / "RESULTS.md"
DATA = (
    Path(__file__).resolve().parent.parent.parent / "shared" / "data"
)  # the real clips, where they are lent


def _store(folder: Path, small: bool) -> list[Result | str]:
    note = (
        "The same bytes in two files can differ by a factor of two by where their pages lie in memory (LOG.md): rows "
        "that read the chunk files compare with the twin; h5py and .npy have files of their own and compare roughly."
    )
    return [note, *store.races(folder, store.SMALL if small else store.FULL)]


def _decoding(folder: Path, small: bool) -> list[Result | str]:
    return [*decoding.races(folder, decoding.SMALL if small else decoding.FULL)]


def _extraction(folder: Path, small: bool) -> list[Result | str]:
    return [*extraction.races(folder, extraction.SMALL if small else extraction.FULL)]


def _memory(folder: Path, small: bool) -> list[Result | str]:
    return [extraction.memory(folder, extraction.SMALL if small else extraction.FULL)]


def _faces(folder: Path, small: bool) -> list[Result | str]:
    if not DATA.is_dir():
        return [f"## Faces\n\nNot measured: the real clips are not here ({DATA}).\n"]
    return [faces.results(DATA)]


def _pretraining(folder: Path, small: bool) -> list[Result | str]:
    return [pretraining.results(small)]


def _gather(folder: Path, small: bool) -> list[Result | str]:
    return [*gather.races(folder, gather.SMALL if small else gather.FULL)]


def _epoch(folder: Path, small: bool) -> list[Result | str]:
    return [*epoch.races(epoch.SMALL if small else epoch.FULL)]


def _scan(folder: Path, small: bool) -> list[Result | str]:
    return [*scan.races(scan.SMALL if small else scan.FULL)]


def _live(folder: Path, small: bool) -> list[Result | str]:
    return [live.results(folder, small)]


def _ablation(folder: Path, small: bool) -> list[Result | str]:
    return [ablation.results(folder if small else ablation.KEPT, small)]


def _studyforrest(folder: Path, small: bool) -> list[Result | str]:
    return [*studyforrest.parts(DATA, small)]


PARTS: dict[str, Callable[[Path, bool], list[Result | str]]] = {
    "store": _store,
    "decoding": _decoding,
    "extraction": _extraction,
    "memory": _memory,
    "faces": _faces,
    "pretraining": _pretraining,
    "gather": _gather,
    "epoch": _epoch,
    "scan": _scan,
    "live": _live,
    "ablation": _ablation,
    "studyforrest": _studyforrest,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; by default all")
    parser.add_argument("--small", action="store_true", help="tiny data, RESULTS.md left alone")
    asked = parser.parse_args()
    if unknown := set(asked.parts) - PARTS.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    for part in asked.parts or PARTS:
        load_before = os.getloadavg()[0]
        # TMPDIR= says on which disk; it must be one, not memory, for fsync to cost what it costs
        with tempfile.TemporaryDirectory(prefix="vacli-benchmarks-") as folder:
            print(f"measuring: {part}", file=sys.stderr)
            text = report.part(part, PARTS[part](Path(folder), asked.small), Path(folder), load_before)
        print(text)
        if not asked.small:
            RESULTS.write_text(report.replaced(RESULTS.read_text(), part, text, list(PARTS)))


if __name__ == "__main__":
    main()
