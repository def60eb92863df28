"""The rules of a hand-in read a second time, and all that can be wrong with one: what is done, what the check says."""

from __future__ import annotations

import re
from collections.abc import Callable

Lines = list[bytes]
MUTATIONS: dict[str, tuple[Callable[[Lines], object], str]] = {
    "no header": (lambda x: x.pop(0), "no header"),
    "another header": (lambda x: x.__setitem__(0, b"image_location,arousal,valence"), "a wrong header"),
    "capitals": (lambda x: x.__setitem__(0, b"Image_location,Valence,Arousal"), "a wrong header"),
    "a space in the header": (
        lambda x: x.__setitem__(0, b"image_location, valence,arousal"),
        "a wrong header",
    ),
    "a blank line for a header": (lambda x: x.__setitem__(0, b""), "a wrong header"),
    "nothing but a header": (lambda x: x.__delitem__(slice(1, None)), "no rows"),
    "nothing": (lambda x: x.clear(), "no rows"),
    "a row lost": (lambda x: x.pop(7), "rows of the sample that are missing (its lines)"),
    "the last row lost": (lambda x: x.pop(), "rows of the sample that are missing (its lines)"),
    "a row twice": (lambda x: x.insert(9, x[8]), "rows that were there before"),
    "the first row again at the end": (lambda x: x.append(x[1]), "rows that were there before"),
    "a foreign row": (lambda x: x.append(b"other/00001.jpg,0,0"), "rows that the sample does not have"),
    "a frame too many": (lambda x: x.append(b"video_b/00004.jpg,0,0"), "rows that the sample does not have"),
    "two rows exchanged": (lambda x: x.insert(4, x.pop(5)), "rows that should stand further up"),
    "a row moved to the end": (lambda x: x.append(x.pop(5)), "rows that should stand further up"),
    "sorted by name": (lambda x: x.reverse() or x.insert(0, x.pop()), "rows that should stand further up"),
    "out of range": (lambda x: cell(x, 3, 1, b"1.000001"), "values outside [-1, 1]"),
    "out of range below": (lambda x: cell(x, 3, 2, b"-1.5"), "values outside [-1, 1]"),
    "infinite": (lambda x: cell(x, 3, 2, b"-inf"), "values outside [-1, 1]"),
    "NaN": (lambda x: cell(x, 3, 1, b"nan"), "values that are NaN"),
    "-5 left": (lambda x: cell(x, 3, 1, b"-5"), "values of -5, which marks a frame without annotation"),
    "-5.0 left": (lambda x: cell(x, 3, 2, b"-5.000"), "values of -5, which marks a frame without annotation"),
    "a word": (lambda x: cell(x, 3, 1, b"high"), "values that are no number"),
    "nothing there": (lambda x: cell(x, 3, 2, b""), "values that are no number"),
    "a number as only Python has it": (lambda x: cell(x, 3, 2, b"0_1"), "values that are no number"),
    "a comma for a point": (lambda x: cell(x, 3, 1, b"0,5"), "rows with another number of values than 2"),
    "a column lost": (lambda x: x.__setitem__(3, x[3].rpartition(b",")[0]), "rows with another number"),
    "semicolons": (lambda x: x.__setitem__(3, x[3].replace(b",", b";")), "rows that do not begin with"),
    "no image": (lambda x: cell(x, 3, 0, b"12-24-1920x1080/3"), "rows that do not begin with"),
    "a number of four digits": (
        lambda x: cell(x, 3, 0, b"12-24-1920x1080/0003.jpg"),
        "rows that the sample does not have",
    ),
    "a blank line": (lambda x: x.insert(5, b""), "blank lines"),
    "a line of spaces": (lambda x: x.insert(5, b"  "), "blank lines"),
    "a blank line at the end": (lambda x: x.append(b""), "blank lines"),
    "a byte order mark": (lambda x: x.__setitem__(0, b"\xef\xbb\xbf" + x[0]), "a byte order mark"),
    "CR LF": (lambda x: x.__setitem__(slice(None), [y + b"\r" for y in x]), "lines that end in CR LF"),
    "CR LF once": (lambda x: x.__setitem__(6, x[6] + b"\r"), "lines that end in CR LF"),
    "a space at the end": (lambda x: x.__setitem__(6, x[6] + b" "), "spaces beside a value"),
    "a tab before": (lambda x: x.__setitem__(6, b"\t" + x[6]), "spaces beside a value"),
    "a space after a comma": (lambda x: x.__setitem__(6, x[6].replace(b",", b", ")), "spaces beside a value"),
    "no UTF-8": (lambda x: cell(x, 3, 0, b"\xff/00003.jpg"), "rows that do not begin with"),
}


def cell(lines: Lines, row: int, column: int, text: bytes) -> None:
    cells = lines[row].split(b",")
    cells[column] = text
    lines[row] = b",".join(cells)


def by_the_rules(text: bytes, sample: bytes) -> bool:
    """Whether a VA file is right: the rules once more, read from their text and not from our code."""
    lines = text.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    if lines[:1] != [b"image_location,valence,arousal"]:
        return False
    wanted = [line.split(b",")[0] for line in sample.split(b"\n")[1:] if line]
    rows = [line.split(b",") for line in lines[1:]]
    if [row[0] for row in rows] != wanted or any(len(row) != 3 for row in rows):
        return False
    number = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
    return all(number.fullmatch(v) and -1 <= float(v) <= 1 for row in rows for v in row[1:])
