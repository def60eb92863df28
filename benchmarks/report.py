"""RESULTS.md: part by part the machine, the versions, and one table for each race, from what was measured just now."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

from .race import Result, Target

PACKAGES = ("numpy", "torch", "timm", "av", "opencv-python-headless", "zarr", "h5py", "crc32c")
HEAD = "| | median | GB/s | ratio | quartiles | target | |\n|---|--:|--:|--:|--:|--:|---|"
ROOT = Path(__file__).resolve().parent.parent


TOP = """# Results

Made by `python -m benchmarks`; a part that was put together by hand says so. Each part says when and on what.
The contenders of a race run in turns, round after round, in one process, with all files in the page cache. The first
row is the plain twin; ratio = the twin's time / the row's time in the same round: more is faster. Figures are medians
over the rounds, quartiles the ratio's.
"""


def part(name: str, results: list[Result | str], disk: Path, load_before: float) -> str:
    """The Markdown text of one part: the machine, then races and sections.

    disk: where the files lay. load_before: of the machine, before the first race.
    """
    races = [r for r in results if not isinstance(r, str)]
    held = [(r, i, t) for r in races for i, c in enumerate(r.contenders) for t in c.targets if not t.goal]
    lines = [f"<!-- part: {name} -->", f"# {name.capitalize()}", ""]
    if held:
        lines += [f"**Targets met: {sum(r.met(i, t) for r, i, t in held)} of {len(held)}.**", ""]
    lines += [
        "| | |\n|---|---|",
        *(f"| {key} | {text} |" for key, text in _machine(disk, load_before).items()),
    ]
    for result in results:
        if isinstance(result, str):
            lines += ["", result.strip()]
        else:
            rounds = len(result.seconds[0])
            lines += [
                "",
                f"## {result.title}",
                "",
                f"{' '.join(result.says.split())} {rounds} rounds.",
                "",
                HEAD,
            ]
            lines += [_row(result, which) for which in range(len(result.contenders))]
    return "\n".join(lines) + "\n"


def replaced(old: str, name: str, text: str, order: list[str]) -> str:
    """RESULTS.md with one part in place of the old one of its name, the parts in their order."""
    found = {piece.partition(" ")[0]: f"<!-- part: {piece}" for piece in old.split("<!-- part: ")[1:]}
    found[name] = text
    return "\n".join([TOP, *(found[n].strip() + "\n" for n in order if n in found)])


def _row(result: Result, which: int) -> str:
    contender = result.contenders[which]
    low, high = result.spread(which)
    cells = [
        contender.name,
        _time(result.median_s(which)),
        f"{result.gb_per_s(which):.2f}" if result.nbytes else "",
        f"{result.ratio(which):.2f}" if which else "1",
        f"{low:.2f}–{high:.2f}" if which else "",
        "<br>".join(map(_wanted, contender.targets)),
        "<br>".join("met" if result.met(which, t) else "**missed**" for t in contender.targets),
    ]
    return f"| {' | '.join(cells)} |"


def _wanted(target: Target) -> str:
    bound = {
        "ratio": f"ratio ≥ {target.bound:g}",
        "seconds": f"< {_time(target.bound)}",
        "gb_per_s": f"≥ {target.bound:g} GB/s",
    }[target.of]
    return f"goal: {bound}" if target.goal else bound


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def _machine(disk: Path, load_before: float) -> dict[str, str]:
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    versions = [f"{name} {version(name)}" for name in PACKAGES]
    return {
        "machine": f"{_cpu()}, {os.cpu_count()} cores, {memory_gb:.0f} GB of memory, {platform.platform()}",
        "disk": _disk(disk),
        "load": f"{load_before:.2f} before, {os.getloadavg()[0]:.2f} after (one contender runs at a time)",
        "versions": ", ".join([f"python {platform.python_version()}", *versions]),
        "commit": _commit(),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = {name.strip(): text.strip() for name, _, text in (line.partition(":") for line in lines)}
    if "model name" not in found:
        return platform.machine()
    return f"{found['model name']} (family {found.get('cpu family')}, model {found.get('model')})"


def _disk(folder: Path) -> str:
    """The file system and device below a folder: a figure with fsync in it means nothing without them."""
    try:
        mounts = [line.split()[:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    above = [(len(at), f"{kind} on {device}") for device, at, kind in mounts if folder.is_relative_to(at)]
    return max(above)[1]


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    try:
        changed = [line for line in git("status", "--porcelain").splitlines() if "RESULTS.md" not in line]
        return git("rev-parse", "--short=12", "HEAD").strip() + (
            " and changes not committed" if changed else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def spread(values: Sequence[float] | np.ndarray) -> str:
    """Mean and standard deviation over seeds; the mean alone of one."""
    values = np.asarray(values)
    return f"{values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")
