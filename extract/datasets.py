"""What lies in a folder: samples from a plain folder of videos, or from the Aff-Wild2 layout."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .. import VacliError
from ..store import Fingerprints, combine
from ..store.curves import RECORDS
from ..store.names import plain_id, split_of
from . import SUFFIXES

CROPS_RATE_HZ = 30.0  # the rate of crops whose video is absent, if no other is stated: Aff-Wild2's usual one
# "annotations", "6th ABAW Annotations", "VA_Set", "VA_Estimation_Challenge"
_ANNOTATIONS = re.compile(r"annotation|^va_(set|estimation)", re.IGNORECASE)
_SIDE = re.compile(r"_(left|right)$")
_CROP = re.compile(r"(\d+)\.(jpe?g|png)", re.IGNORECASE)


@dataclass(frozen=True)
class Sample:
    """One person in one video: what a curve is drawn for.

    id: unique within the root; the annotation's stem in Aff-Wild2 (`12_left`), else the path below the root; a
    plain name made of it where that could lead out of a folder or is no name on every system.
    video: the file with pictures and sound, if it is there. crops: a folder of aligned faces `%05d.jpg`, by frame
    number from 1, if the data set brings them. annotation: a VA file. split: train, validation, test or None. person:
    who of those in the video, as `Person` knows them. crops_rate_hz: frames a second of crops without a video.
    """

    id: str
    root: Path
    video: Path | None = None
    crops: Path | None = None
    annotation: Path | None = None
    split: str | None = None
    person: str = "main"
    crops_rate_hz: float = CROPS_RATE_HZ
    among: str | None = None  # the id of the sample for everybody that this person is one of

    @property
    def source(self) -> Path:
        """What a message about the sample names: its video, or its crops."""
        source = self.video or self.crops
        assert source is not None
        return source

    @property
    def video_id(self) -> str:
        """The same for everybody in one video: the id, without what tells one of two people from the other."""
        bare = _SIDE.sub("", self.id)
        of_side = self.video is not None and self.video.stem == Path(bare).name
        return self.among or (bare if of_side else self.id)

    @property
    def name(self) -> str:
        """What people call the video: its path below the root, whatever characters are in it."""
        folder = os.path.relpath(os.path.realpath(self.source.parent), self.root)
        inside = folder if not folder.startswith("..") else ""
        return (Path(inside) / self.source.name).as_posix()

    def crop_files(self) -> dict[int, Path]:
        """Frame index (from 0) -> the file of its aligned face; numbers may be missing."""
        assert self.crops is not None
        numbered = ((_CROP.fullmatch(p.name), p) for p in self.crops.iterdir())
        return {
            int(m[1]) - 1: p
            for m, p in sorted(numbered, key=lambda pair: pair[1].name)
            if m and int(m[1]) > 0
        }

    def media(self, fingerprints: Fingerprints) -> str:
        """Digest of what the pictures are made from: the video's bytes, or the crops' and what times them."""
        timed_by = fingerprints.file(self.video) if self.video else f"{float(self.crops_rate_hz)} Hz"
        if self.crops is None:
            return timed_by
        return combine(fingerprints.folder(self.crop_files().values()), timed_by)

    def frame_times_s(self) -> np.ndarray:
        """(T,) seconds of every frame: of the video where it is there, else of the crops at crops_rate_hz."""
        return self.frame_clock()[0]

    def frame_clock(self) -> tuple[np.ndarray, str | None]:
        """`frame_times_s`, and what of the video could not be read on the way."""
        from .media import Video

        if self.video is None:
            return np.arange(max(self.crop_files(), default=-1) + 1) / self.crops_rate_hz, None
        video = Video(self.video)
        return np.fromiter(video.times(), np.float64), video.damage

    def read_crops(self, rows: int, batch: int = 64) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The aligned faces of the first `rows` frames: (crops (n, H, W, 3) uint8 RGB, rows (n,)), in order.

        An unreadable picture counts as missing: its row stays NaN.
        """
        import cv2

        files = [(row, path) for row, path in sorted(self.crop_files().items()) if row < rows]
        for start in range(0, len(files), batch):
            pictures = [
                (row, cv2.imread(str(path), cv2.IMREAD_COLOR)) for row, path in files[start : start + batch]
            ]
            seen = [(row, cv2.cvtColor(p, cv2.COLOR_BGR2RGB)) for row, p in pictures if p is not None]
            for same in _same_size(seen):
                yield np.stack([p for _, p in same]), np.array([row for row, _ in same])


def _same_size(pictures: list[tuple[int, np.ndarray]]) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Runs of neighbours of one size (crops of one folder nearly always are)."""
    run: list[tuple[int, np.ndarray]] = []
    for row, picture in pictures:
        if run and picture.shape != run[-1][1].shape:
            yield run
            run = []
        run.append((row, picture))
    if run:
        yield run


def find(root: str | Path, crops_rate_hz: float = CROPS_RATE_HZ) -> list[Sample]:
    """The samples below a folder (or the one of a single file), sorted by id.

    A folder with `cropped_aligned*` or `annotations` in it, or VA files in another folder that speaks of annotations or
    VA, is read as Aff-Wild2; any other as a plain folder of videos, searched through its subfolders. crops_rate_hz:
    frames a second of the crops whose video is absent. Raises VacliError if there is no such folder or nothing in it,
    for a rate that is none, and where a sample of Aff-Wild2 has two videos, folders of crops or unlike annotations.
    """
    root = Path(root)
    if not (math.isfinite(crops_rate_hz) and crops_rate_hz > 0):
        raise VacliError(
            f"crops at {crops_rate_hz} frames a second; wanted a rate above 0, as --crops-rate-hz 30"
        )
    if not root.exists():
        raise VacliError(f"no such file or folder: {root}; wanted a video or a folder of videos")
    if root.is_file():
        return _plain(root.parent, [root])
    annotations = _annotations(root)
    if annotations or (root / "annotations").is_dir() or any(root.glob("cropped_aligned*/")):
        samples = _affwild2(root, annotations, crops_rate_hz)
    else:
        samples = _plain(root, _videos(root))
    if not samples:
        kinds = " ".join(sorted(SUFFIXES))
        raise VacliError(f"no videos below {root}; wanted files ending in {kinds}, or the Aff-Wild2 layout")
    return sorted(samples, key=lambda s: s.id)


def find_all(paths: Sequence[str | Path], crops_rate_hz: float = CROPS_RATE_HZ) -> list[Sample]:
    """The samples of several files and folders, each once, sorted by id; no two have the same.

    A text file is a list: a path a line, as seen from here or from the list's own folder; empty lines and those that
    begin with # are passed over. A line that leads nowhere is a sample all the same, whose problem is told with the
    others'. Ids that clash say also where the folder asked for lies, below the one that all are in.

    Raises VacliError as `find` does, and for a list that cannot be read or of which no line leads anywhere.
    """
    found: dict[tuple[str, ...], Sample] = {}
    for path in _listed([Path(p) for p in paths]):
        for s in find(path, crops_rate_hz) if _is_there(path) else _plain(path.parent, [path]):
            found.setdefault((os.path.realpath(s.source), os.path.realpath(s.crops or s.source), s.person), s)
    samples = list(found.values())
    common = Path(os.path.commonpath([s.root for s in samples]))
    longer = [
        (s.id, *(plain_id((s.root.relative_to(common) / n).as_posix()) for n in (s.id, s.name)))
        for s in samples
    ]
    lengths = [0] * len(samples)
    while True:
        ids = [names[n] for names, n in zip(longer, lengths, strict=True)]
        count = Counter(ids)
        more = [min(n + (count[name] > 1), 2) for n, name in zip(lengths, ids, strict=True)]
        if more == lengths:
            break
        lengths = more
    # whose id says where it lies, his name does too
    told = (
        replace(s, id=name, root=common if n else s.root)
        for s, name, n in zip(samples, ids, lengths, strict=True)
    )
    return sorted(told, key=lambda s: s.id)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a line of prose can be no name at all
        return False


def _listed(paths: list[Path]) -> Iterator[Path]:
    """The paths, with those that a list names in its place."""
    for path in paths:
        if not _is_there(path):
            raise VacliError(f"no such file or folder: {path}; wanted a video, a folder of videos or a list")
        if path.suffix.lower() in (".txt", ".lst") and path.is_file():
            yield from _lines(path)
        else:
            yield path


def _lines(path: Path) -> list[Path]:
    if _is_va(path):
        raise VacliError(f"{path} holds labels; wanted a video, a folder of videos, or a list of their paths")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise VacliError(f"cannot read the list {path}: {e}; wanted a path a line") from e
    lines = (line.strip() for line in text.split("\n"))
    named = [Path(line) for line in lines if line and not line.startswith("#")]
    here = [p if _is_there(p) or not _is_there(path.parent / p) else path.parent / p for p in named]
    if not any(map(_is_there, here)):
        raise VacliError(f"the list {path} names no file or folder that is there; wanted a path a line")
    return here


def _videos(root: Path) -> list[Path]:
    found = (p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    return _in_sight(root, (p for p in found if not _is_ours(p)))


def _is_ours(path: Path) -> bool:
    """Whether it is a film that `vacli predict` made, an overlay or a copy for a page: it says so itself."""
    by_name = path.name.endswith(".overlay.mp4")
    by_place = any(p.name == "media" and (p.parent / RECORDS).is_dir() for p in path.parents)
    if not by_name and not by_place:
        return False
    import av

    try:
        with av.open(f"file:{path}", metadata_errors="replace") as film:
            return film.metadata.get("comment", "").startswith("vacli ")
    except (av.FFmpegError, OSError):
        return False


def _in_sight(root: Path, paths: Iterable[Path]) -> list[Path]:
    """Sorted, without what a leading dot hides (.ipynb_checkpoints/, ._clip.mp4)."""
    return sorted(p for p in paths if not any(part.startswith(".") for part in p.relative_to(root).parts))


def _plain(root: Path, videos: list[Path]) -> list[Sample]:
    """Every video is a sample; `train/` and `validation/` folders split it, `clip.txt` beside `clip.mp4` labels it."""
    return [
        Sample(
            name,
            root.resolve(),
            path,
            None,
            path.with_suffix(".txt") if _is_va(path.with_suffix(".txt")) else None,
            _split_of(path, root),
        )
        for path, name in zip(videos, _plain_ids(root, videos), strict=True)
    ]


def _plain_ids(root: Path, files: list[Path]) -> list[str]:
    """An id for each file: its path below the root, without the suffix where that will do (a.mp4 beside a.mov)."""
    inside = [p.relative_to(root) for p in files]
    count = Counter(p.with_suffix("") for p in inside)
    return [plain_id((p if count[p.with_suffix("")] > 1 else p.with_suffix("")).as_posix()) for p in inside]


def _is_va(path: Path) -> bool:
    try:
        with open(path, encoding="utf-8-sig") as f:
            header = f.readline(200).lower()
    except (OSError, UnicodeDecodeError):
        return False
    return "valence" in header and "arousal" in header


def _split_of(path: Path, root: Path) -> str | None:
    return split_of(path.relative_to(root).parts[:-1])


def _annotations(root: Path) -> list[Path]:
    """VA files below the folders that hold annotations: what those are called changes from year to year."""
    folders = [p for p in root.iterdir() if _ANNOTATIONS.search(p.name) and p.is_dir()]
    return [p for folder in folders for p in _in_sight(root, folder.rglob("*.txt")) if _is_va(p)]


def _affwild2(root: Path, va_files: list[Path], crops_rate_hz: float) -> list[Sample]:
    """Annotation stems and crop folders are the ids; `_left`/`_right` share the video of the bare name."""
    annotations = _by_name("annotations", [(p.stem, p) for p in va_files])
    crops = _by_name("crops", [(p.name, p) for p in _in_sight(root, root.glob("cropped_aligned*/*/"))])
    videos = _by_name("videos", [(p.stem, p) for p in _videos(root)])
    bare = {name: _SIDE.sub("", name) for name in annotations.keys() | crops.keys()}
    names = bare.keys() | (
        videos.keys() - set(bare.values())
    )  # test videos have neither labels nor, maybe, crops
    return [
        Sample(
            id=plain_id(name),
            root=root.resolve(),
            video=videos.get(name) or videos.get(bare.get(name, name)),
            crops=crops.get(name),
            annotation=annotations.get(name),
            split=_split_of(annotations[name], root) if name in annotations else None,
            person=_SIDE.findall(name)[0] if _followed_aside(name, videos, crops) else "main",
            crops_rate_hz=crops_rate_hz,
        )
        for name in names
        if name in crops or name in videos or bare.get(name) in videos
    ]


def _followed_aside(name: str, videos: dict[str, Path], crops: dict[str, Path]) -> bool:
    """Whether this is one of two people whom nobody has cropped out of the video they share."""
    return bool(_SIDE.search(name)) and name not in crops and name not in videos


def _by_name(kind: str, named: list[tuple[str, Path]]) -> dict[str, Path]:
    """Each name's one file or folder. Raises VacliError where a name has several that are not the same."""
    found: dict[str, list[Path]] = {}
    for name, path in named:
        found.setdefault(name, []).append(path)
    for name, paths in found.items():
        if len(paths) > 1:
            found[name] = paths = _unlike(paths)
        if len(paths) > 1:
            raise VacliError(
                f"{name} has several {kind}: {', '.join(map(str, paths))}; wanted one; move the others out of there"
            )
    return {name: paths[0] for name, paths in found.items()}


def _unlike(paths: list[Path]) -> list[Path]:
    """Without folders that hold no crop while another does, and without texts that say in the same split the same."""
    if paths[0].is_dir():
        return [p for p in paths if any(_CROP.fullmatch(file.name) for file in p.iterdir())] or paths[:1]
    if paths[0].suffix != ".txt":
        return paths
    said = {(split_of(p.parts[:-1]), p.read_bytes()): p for p in reversed(paths)}
    return sorted(said.values())
