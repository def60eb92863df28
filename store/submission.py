"""The challenge's hand-in: curves in the header, rows and order of the official sample; a check of any such file."""

from __future__ import annotations

import contextlib
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from .. import VacliError, printable
from .curves import About, read_csv, recall, whole_file
from .labels import UNLABELLED

# Shape legend: T rows of a curve, N rows of a file.
# A file of the challenge is a header, then `<video>/00001.jpg,...` for each frame, which are counted from 1.

_EXPRESSIONS = ("Neutral", "Anger", "Disgust", "Fear", "Happiness", "Sadness", "Surprise", "Other")
_UNITS = tuple(f"AU{n}" for n in (1, 2, 4, 6, 7, 10, 12, 15, 23, 24, 25, 26))
HEADERS = {
    task: ",".join(("image_location", *names))
    for task, names in {"va": ("valence", "arousal"), "expr": _EXPRESSIONS, "au": _UNITS}.items()
}
_COLUMNS = {"va": 2, "expr": 1, "au": 12}  # of a row, after the location: EXPR names eight and has one
_BOM = b"\xef\xbb\xbf"
_ROW = re.compile(rb"([^,]+)/(\d{1,9})\.jpg")
_LINE_BYTES = 2**16
SHOWN = 20  # of each kind of finding
FEW, FEW_SHARE = 10, 0.02  # frames, or share of a curve, by which sample and decoder may differ on one video
_Rows = tuple[np.ndarray, np.ndarray]  # (N,) a hash of each row's location, (N,) the line it stands in


# ---- writing -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """What a hand-in holds. held: video -> its frames beyond the end of the curve, which have its last row.

    empty: video -> rows of its curve without a value, which have the nearest. clipped: values outside [-1, 1]. unlike:
    video -> (its last frame in the sample, rows of its curve), where these are too far apart to be of one video.
    """

    path: Path
    rows: int
    videos: int
    held: dict[str, int]
    empty: dict[str, int]
    clipped: int
    unlike: dict[str, tuple[int, int]]


def write_submission(folder: Path, sample: Path, out: Path, task: str = "va") -> Written:
    """Write the curves of a folder as the challenge's file: header, rows and order of the official sample.

    The sample's own values are ignored. A frame beyond the end of a curve has the curve's last row. A sample's video is
    the curve of that id, else of a video file of that name; `x_left` is also the person "left" of video `x`. The file
    is whole or as it was before; a million rows take ten seconds and less than a hundred megabytes.

    Raises VacliError for a task other than va, a sample that is none, and videos without a curve or with several: all
    of them are named, nothing is written.
    """
    if task != "va":
        raise VacliError(
            f"vacli predicts valence and arousal, so it cannot write a file for {task}; wanted --task va "
            "(`vacli submit --check FILE` takes files of all three tasks)"
        )
    header, _, videos = _sample(sample)
    if out.exists() and out.samefile(sample):
        raise VacliError(f"--out {out} is the sample itself; wanted another name, as --out submission.txt")
    if header != HEADERS["va"]:
        raise VacliError(
            f"{sample}: its first line is {header[:80]!r}; wanted the sample of VA: {HEADERS['va']}"
        )
    read = {video: _values(about) for video, about in _curves_of(folder, sample, videos).items()}
    silent = [video for video, (values, _, _) in read.items() if not len(values)]
    if silent:
        raise VacliError(
            f"{len(silent)} curves in {folder} hold no value: {', '.join(silent)}; wanted a row for each frame: "
            "look at the videos, and predict them again with `vacli predict --video FILE`"
        )
    held: Counter[str] = Counter()
    last: Counter[str] = Counter()
    rows = 0
    with whole_file(out) as f:
        f.write(HEADERS["va"] + "\n")
        for _, location, video, frame in _sample_rows(sample):
            values = read[video][0]
            if frame > len(values):
                held[video] += 1
            last[video] = max(last[video], frame)
            valence, arousal = values[min(frame, len(values)) - 1].tolist()
            f.write(f"{location},{valence:.6f},{arousal:.6f}\n")
            rows += 1
    empty = {video: n for video, (_, n, _) in read.items() if n}
    ends = {video: (last[video], len(values)) for video, (values, _, _) in read.items()}
    unlike = {video: (a, b) for video, (a, b) in ends.items() if abs(a - b) > max(FEW, FEW_SHARE * b)}
    return Written(out, rows, len(read), dict(held), empty, sum(n for _, _, n in read.values()), unlike)


def _values(about: About) -> tuple[np.ndarray, int, int]:
    """(T, 2) float64, finite, in [-1, 1] and of six decimals; how many rows were filled, how many values clipped."""
    assert about.csv is not None
    track = read_csv(about.csv).track
    known = np.flatnonzero(track.valid)
    if not len(known):
        return np.empty((0, 2)), 0, 0
    at = np.searchsorted(known, np.arange(len(track)))
    before, after = known[np.maximum(at - 1, 0)], known[np.minimum(at, len(known) - 1)]
    rows = np.arange(len(track))
    values = track.values[np.where(abs(rows - before) < abs(after - rows), before, after)].astype(np.float64)
    clipped = int((np.abs(track.values[known]) > 1).sum())
    # + 0.0: no row says -0.000000
    return np.round(np.clip(values, -1, 1), 6) + 0.0, len(track) - len(known), clipped


def _sample(sample: Path) -> tuple[str, _Rows, list[str]]:
    """Its header, rows and videos. Raises VacliError if it is none."""
    with _opened(sample) as f:
        header = _header(f.readline(_LINE_BYTES))
    hashes, lines = array("q"), array("q")
    videos: dict[str, None] = {}
    for number, location, video, _ in _sample_rows(sample):
        hashes.append(hash(location.encode()))
        lines.append(number)
        videos[video] = None
    rows = np.asarray(hashes, np.int64), np.asarray(lines, np.int64)
    twice = _doubled(rows[0])
    if not videos or len(twice):
        odd = f"{len(twice)} rows twice" if videos else "no rows"
        raise VacliError(
            f"{sample} has {odd}; wanted <video>/00001.jpg,... once each, as the official sample has"
        )
    return header, rows, list(videos)


def _sample_rows(sample: Path) -> Iterator[tuple[int, str, str, int]]:
    """Line number, location, video and frame of each row; whatever values stand behind the location."""
    with _opened(sample) as f:
        for number, line in _lines(sample, f):
            location = line.partition(b",")[0].strip()
            row = _ROW.fullmatch(location)
            if row is None and (not line.strip() or (number == 1 and _header(line) in HEADERS.values())):
                continue
            if row is None or not int(row[2]) or not _is_text(location):
                raise VacliError(
                    f"{sample} line {number}: {_shown(line)!r}; wanted <video>/00001.jpg,... as it came"
                )
            yield number, location.decode(), row[1].decode(), int(row[2])


# ---- which curve a video of the sample has -------------------------------------------------------------------


def _curves_of(folder: Path, sample: Path, videos: Iterable[str]) -> dict[str, About]:
    """Each video's one curve. Raises VacliError that names all that have none, or several."""
    abouts = recall(folder)
    by_id = {about.id: about for about in abouts}
    by_name: dict[str, list[About]] = {}
    for about in abouts:
        for name in _names(about):
            by_name.setdefault(name, []).append(about)
    found = {video: _candidates(video, by_id, by_name) for video in videos}
    several = [f"{video} ({', '.join(a.id for a in some)})" for video, some in found.items() if len(some) > 1]
    if several:
        raise VacliError(
            f"{len(several)} videos of {sample.name} have several curves in {folder}: {', '.join(several)}; "
            "wanted one each: move the others to another folder"
        )
    missing = [video + _why(by_id.get(video)) for video, some in found.items() if not some]
    if missing:
        raise VacliError(
            f"{len(missing)} of {len(found)} videos of {sample.name} have no curve in {folder}: "
            f"{', '.join(missing)}; make them with `vacli predict --video DIR --out {folder}`"
            f"{_SIDES if any(_side(video)[1] for video in found) else ''}"
        )
    return {video: some[0] for video, some in found.items()}


_SIDES = (
    " (x_left and x_right are two people of video x: give the data set's root, whose cropped_aligned/ "
    "names them, or --person left and --person right)"
)


def _names(about: About) -> set[str]:
    """What a sample may call the video: the last part of its name and of its file's, with and without suffix."""
    last = PurePosixPath(about.name)
    names = {last.name, last.stem, PurePosixPath(about.video_id).name}
    return names if about.video is None else names | {about.video.name, about.video.stem}


def _candidates(video: str, by_id: dict[str, About], by_name: dict[str, list[About]]) -> list[About]:
    """The curve of that id, else all of a video of that name; of another person than the sample's, none."""
    bare, side = _side(video)
    exact = by_id.get(video)
    if exact and exact.csv and exact.person in ("main", side):
        return [exact]
    mine = [a for a in by_name.get(video, ()) if a.person == "main"]
    beside = [a for a in by_name.get(bare, ()) if a.person == side] if side else []
    return list({a.id: a for a in (*mine, *beside) if a.csv}.values())


def _side(video: str) -> tuple[str, str | None]:
    """(`12`, "left") of `12_left`."""
    bare, _, side = video.rpartition("_")
    return (bare, side) if side in ("left", "right") else (video, None)


def _why(about: About | None) -> str:
    return f" ({about.problem.partition(';')[0][:80]})" if about and about.problem else ""


# ---- checking ------------------------------------------------------------------------------------------------


@dataclass
class Finding:
    """A kind of fault in a file. wrong: False for what is only odd. where: the first of them, line and its text."""

    what: str
    wrong: bool
    count: int = 0
    where: list[tuple[int, str]] = field(default_factory=list)


class _Findings(dict[str, Finding]):
    def add(self, what: str, line: int, text: bytes, wrong: bool = True) -> None:
        finding = self.setdefault(what, Finding(what, wrong))
        finding.count += 1
        if len(finding.where) < SHOWN:
            finding.where.append((line, _shown(text)))

    def add_all(self, what: str, file: Path, lines: np.ndarray) -> None:
        """Those lines of a file, whose text is looked up: a million rows are not kept for the few that are shown."""
        if len(lines):
            self[what] = Finding(what, True, len(lines), _texts(file, np.sort(lines)[:SHOWN].tolist()))


def check_submission(path: Path, sample: Path | None = None) -> list[Finding]:
    """What is wrong (or odd: `wrong` False) with a challenge file of VA, EXPR or AU, told by its header.

    With the official sample also whether its rows are all there, once and in their order. Every fault is counted, the
    first SHOWN of each kind have their line. An empty list: nothing was found. A million rows take seconds.

    Raises VacliError for a file that cannot be read and for a sample that is none.
    """
    found = _Findings()
    with _opened(path) as f:
        first = f.readline(_LINE_BYTES)
        task = _check_header(first, found)
        f.seek(0)
        lines = _lines(path, f)
        if not _ROW.fullmatch(first.removeprefix(_BOM).partition(b",")[0].strip()):
            next(lines, None)
        hashes, numbers = _check_rows(lines, task, found, gaps=sample is None)
    if not len(numbers):
        found.add("no rows", 1, b"")
    twice = _doubled(hashes)
    found.add_all("rows that were there before", path, numbers[twice])
    if sample is not None:
        _compare(path, (np.delete(hashes, twice), np.delete(numbers, twice)), sample, task, found)
    return sorted(found.values(), key=lambda one: not one.wrong)


def _check_header(first: bytes, found: _Findings) -> str | None:
    """The task. A header that is not quite right is a finding, and guessed at."""
    header = first.removeprefix(_BOM).rstrip(b"\r\n")
    if first.startswith(_BOM):
        found.add("a byte order mark before the header", 1, header)
    if first.endswith(b"\r\n"):
        found.add(_CR_LF, 1, header)
    for task, wanted in HEADERS.items():
        if header == wanted.encode():
            return task
    names = header.lower().replace(b" ", b"").split(b",")
    headless = _ROW.fullmatch(names[0])
    if headless:
        guess = next((task for task, n in _COLUMNS.items() if n + 1 == len(names)), None)
    else:
        signs = {b"valence": "va", b"arousal": "va", b"neutral": "expr", b"au1": "au"}
        guess = next((signs[name] for name in names if name in signs), None)
    wanted = HEADERS[guess] if guess else " or ".join(HEADERS.values())
    found.add(f"{'no' if headless else 'a wrong'} header; wanted {wanted}", 1, header)
    return guess


def _check_rows(lines: Iterator[tuple[int, bytes]], task: str | None, found: _Findings, gaps: bool) -> _Rows:
    """Each line by itself. gaps: whether to tell where a video's frames are not 1, 2, 3, ...: no sample says it."""
    hashes, numbers = array("q"), array("q")
    check, columns = (_CHECKS[task], _COLUMNS[task]) if task else (None, 0)
    last: dict[bytes, int] = {}
    constant: list[bytes | None] | None = None  # each column's one value, as long as it has one
    for number, raw in lines:
        line = raw.removesuffix(b"\n")
        if line.endswith(b"\r"):
            line = line.removesuffix(b"\r")
            found.add(_CR_LF, number, line)
        fields = line.split(b",")
        bare = [text.strip() for text in fields]
        if bare == [b""]:
            found.add("blank lines", number, line)
            continue
        if bare != fields:
            found.add("spaces beside a value", number, line)
        location, *values = bare
        row = _ROW.fullmatch(location)
        if row is None or not _is_text(location):
            found.add("rows that do not begin with <video>/00001.jpg", number, line)
        elif gaps:
            _check_frame(row[1], row[2], number, line, last, found)
        hashes.append(hash(location))
        numbers.append(number)
        if check is None:
            continue  # nobody knows what the values should be
        if len(values) != columns:
            found.add(f"rows with another number of values than {columns}", number, line)
            continue
        for fault in filter(None, dict.fromkeys(map(check, values))):
            found.add(fault, number, line)
        if constant is None:
            constant = [*values]
        elif any(constant):
            constant = [c if c == text else None for c, text in zip(constant, values, strict=False)]
    if task and len(numbers) > 1:
        _tell_constant(task, constant or [], found)
    return np.asarray(hashes, np.int64), np.asarray(numbers, np.int64)


def _check_frame(
    video: bytes, digits: bytes, number: int, line: bytes, last: dict[bytes, int], found: _Findings
) -> None:
    frame, before = int(digits), last.get(video, 0)
    if digits != b"%05d" % frame:
        found.add("frame numbers that are not of five digits", number, line, wrong=False)
    if frame != before + 1:
        kind = (
            "frame numbers with gaps, or out of order" if before else "videos whose first frame is not 00001"
        )
        found.add(kind, number, line, wrong=False)
    last[video] = frame


def _tell_constant(task: str, constant: list[bytes | None], found: _Findings) -> None:
    names = ["the expression"] if task == "expr" else HEADERS[task].split(",")[1:]
    for name, value in zip(names, constant, strict=False):
        if value is not None:
            found.add(f"{name} is the same in all rows", 2, value, wrong=False)


def _compare(path: Path, rows: _Rows, sample: Path, task: str | None, found: _Findings) -> None:
    """The rows, each once, against the sample's."""
    header, (hashes, lines), _ = _sample(sample)
    if task and header in HEADERS.values() and header != HEADERS[task]:
        found.add(f"the sample {sample.name} is of another task", 1, header.encode())
    sorter = np.argsort(hashes, kind="stable")
    places = sorter[np.minimum(np.searchsorted(hashes, rows[0], sorter=sorter), len(hashes) - 1)]
    known = hashes[places] == rows[0]
    missing = np.ones(len(hashes), bool)
    missing[places[known]] = False
    found.add_all("rows of the sample that are missing (its lines)", sample, lines[missing])
    found.add_all("rows that the sample does not have", path, rows[1][~known])
    falls = np.flatnonzero(np.diff(places[known]) < 0) + 1
    found.add_all("rows that should stand further up", path, rows[1][known][falls])


# ---- values --------------------------------------------------------------------------------------------------

_CR_LF = "lines that end in CR LF; wanted LF alone"
_NO_NUMBER = "values that are no number"


def _check_va(text: bytes) -> str | None:
    try:
        value = float(text)
    except ValueError:
        return _NO_NUMBER
    if b"_" in text:  # Python's 1_0
        return _NO_NUMBER
    if -1 <= value <= 1:
        return None
    if value == UNLABELLED:
        return "values of -5, which marks a frame without annotation"
    return "values that are NaN" if value != value else "values outside [-1, 1]"


def _one_of(allowed: Iterable[bytes], wanted: str) -> Callable[[bytes], str | None]:
    known: dict[bytes, str | None] = dict.fromkeys(allowed)
    known[b"-1"] = "values of -1, which marks a frame without annotation"
    return lambda text: known.get(text, f"values that are not {wanted}")


_CHECKS: dict[str, Callable[[bytes], str | None]] = {
    "va": _check_va,
    "expr": _one_of((b"%d" % n for n in range(8)), "a whole number from 0 to 7"),
    "au": _one_of((b"0", b"1"), "0 or 1"),
}


# ---- lines ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as f:
            yield f
    except OSError as e:
        raise VacliError(f"cannot read {path}: {e.strerror or e}; wanted a text file of the challenge") from e


def _lines(path: Path, f: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Each line with its number, from 1, its end as it is."""
    for number, line in enumerate(iter(lambda: f.readline(_LINE_BYTES), b""), 1):
        if len(line) == _LINE_BYTES:
            raise VacliError(f"{path} line {number} has {_LINE_BYTES} bytes or more; wanted a challenge file")
        yield number, line.removeprefix(_BOM) if number == 1 else line


def _header(line: bytes) -> str:
    return line.removeprefix(_BOM).strip().decode(errors="replace")


def _is_text(text: bytes) -> bool:
    if text.isascii():
        return True
    try:
        return bool(text.decode())
    except UnicodeDecodeError:
        return False


def _doubled(hashes: np.ndarray) -> np.ndarray:
    """Where something stands that stood before. Of 64 bits, so two of a million alike by chance are not to be had."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    return np.sort(order[1:][ordered[1:] == ordered[:-1]])


def _texts(path: Path, lines: list[int]) -> list[tuple[int, str]]:
    wanted = set(lines)
    with _opened(path) as f:
        found = {number: _shown(line) for number, line in _lines(path, f) if number in wanted}
    return sorted(found.items())


def _shown(line: bytes) -> str:
    return printable(line.strip(b"\r\n").decode(errors="replace"))[:100]
