"""What people call videos: ids that are safe as a path on every system, and one small record for each id."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from .recipe import SHA256, TRACK_NAME, digest

_PART_BYTES, _ID_BYTES = 180, 600  # room for a suffix within the 255 bytes of most file systems
_FORBIDDEN = set('<>:"|?*\\')
_WINDOWS = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com\d|lpt\d) *(\..*)?", re.IGNORECASE | re.DOTALL)
_USUAL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,100}[A-Za-z0-9_-])?")  # most are, and need no closer look
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\U000e0100-\U000e01ef]"
)
FOLDER = re.compile(TRACK_NAME.pattern + "@[0-9a-f]{16}")
_SPLITS = {"training": "train", "val": "validation", **{s: s for s in ("train", "validation", "test")}}


def plain_id(text: str) -> str:
    """The text itself if it is safe as a relative path on every system, else a plain name made of it.

    Not safe: `..`, absolute paths, control and invisible characters, what Windows refuses, compatibility forms that
    look like other characters (a full-width slash), very long names. What is made ends in 8 hex digits of the text's
    SHA-256, so two texts stay two ids. plain_id(plain_id(x)) == plain_id(x).
    """
    parts = text.split("/")
    if all(map(_is_plain, parts)) and len(text.encode()) <= _ID_BYTES:
        return text
    slugs = [
        re.sub(r"[^A-Za-z0-9_-]+", "_", unicodedata.normalize("NFKC", p))[:40].strip("_-") for p in parts
    ]
    slug = "_".join(s for s in slugs if s)[:80] or "video"
    return f"{slug}-{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:8]}"


def _is_plain(part: str) -> bool:
    if _USUAL.fullmatch(part):
        return not _WINDOWS.fullmatch(part)
    return (
        part != ""
        and not part.startswith((".", " ", "-", "~"))
        and not part.endswith((".", " "))
        and not any((unicodedata.category(c)[0] in "CZ" and c != " ") or c in _FORBIDDEN for c in part)
        and not _UNSEEN.search(part)  # letters and marks without a picture; the categories do not tell them
        and unicodedata.normalize("NFKC", part) == part
        and len(part.encode()) <= _PART_BYTES
        and not _WINDOWS.fullmatch(part)
    )


def split_of(folders: Iterable[str]) -> str | None:
    """train, validation or test, where one of the folders a file lies in is called so (also val, Train_Set, ...)."""
    words = (folder.lower().replace("_set", "") for folder in folders)
    return next((_SPLITS[word] for word in words if word in _SPLITS), None)


def folder_of(video_id: str) -> str:
    """The folder of an id below `videos/`: a digest, so no id can lead anywhere else."""
    return hashlib.sha256(video_id.encode(errors="surrogatepass")).hexdigest()[:24]


def record(video_id: str, facts: dict[str, Any]) -> dict[str, Any]:
    """What lies in `videos/<folder>`: the id and its facts, with their digest."""
    found = {"id": video_id, **facts}
    return {**found, "digest": digest(found)}


def checked(folder: str, found: Any) -> tuple[str, dict[str, Any]]:
    """(id, facts) of what lies in `videos/<folder>`. Raises ValueError if it is not what we would have written."""
    facts = dict(found)
    if facts.pop("digest") != digest(facts, of_json=True):
        raise ValueError("it has been changed")
    video_id = facts.pop("id")
    if plain_id(video_id) != video_id or folder_of(video_id) != folder:
        raise ValueError(f"the id {video_id!r:.80} does not belong here")
    return video_id, check_facts(facts)


def check_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts of a video, if they have the right form; else ValueError."""
    root, media, split, tracks = (facts[k] for k in ("root", "media", "split", "tracks"))
    if not isinstance(root, str) or not isinstance(split, str | None):
        raise ValueError(f"root and split must be text, got {root!r:.80} and {split!r:.80}")
    if media is not None and not SHA256.fullmatch(media):
        raise ValueError(f"the medium must be a SHA-256, got {media!r:.80}")
    for name, track in tracks.items():
        if not _matches(TRACK_NAME, name):
            raise ValueError(f"the name of a track must match {TRACK_NAME.pattern}, got {name!r:.80}")
        if not _matches(FOLDER, track["folder"]) or not SHA256.fullmatch(track["media"]):
            raise ValueError(f"track {name!r:.80} points to {track['folder']!r:.80} {track['media']!r:.80}")
    return facts


@lru_cache(maxsize=1024)
def _matches(pattern: re.Pattern[str], text: str) -> bool:
    """Remembered: thousands of videos have the same few tracks."""
    return pattern.fullmatch(text) is not None


class Taken(ValueError):
    """The id stands for another medium already."""


def merge(old: dict[str, Any] | None, facts: dict[str, Any], tracks: dict[str, Any]) -> dict[str, Any]:
    """What is known of an id once `tracks` are linked to it.

    facts: "root", "media", "split". A medium of None is an id known by imported tracks only: an extraction adopts it,
    and an import into an id that is there changes neither root nor medium. Raises Taken if the id stands for a
    medium from another root.
    """
    new = {**facts, "tracks": dict(tracks)}
    if old is None:
        return new
    if None in (old["media"], facts["media"]) or old["media"] == facts["media"]:
        kept = old if old["media"] is not None else facts  # seen from another folder, it stays where it was
        split = facts["split"] or old["split"]
        return {
            "root": kept["root"],
            "media": kept["media"],
            "split": split,
            "tracks": {**old["tracks"], **tracks},
        }
    if old["root"] != facts["root"]:
        raise Taken(old["root"])
    return new  # another file under the same path: what was made of the old one is not its
