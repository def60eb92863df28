"""One self-contained HTML document: styles, scripts and data inside it, and no way out to the network."""

from __future__ import annotations

import base64
import hashlib
import json
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

# media and pictures may lie beside the page; nothing else is ever fetched (https://www.w3.org/TR/CSP3/)
_POLICY = (
    "default-src 'none'; script-src {scripts}; style-src {styles}; media-src 'self' file: blob:; "
    "img-src 'self' file: data: blob:; base-uri 'none'; form-action 'none'"
)
_DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
{styles}
</head>
<body>
{body}
<script type="application/json" id="data">{data}</script>
{scripts}
</body>
</html>
"""


def document(title: str, body: str, data: object, scripts: Sequence[str], styles: Sequence[str]) -> str:
    """A page that needs no other file but its media.

    title: text, escaped here. body: HTML, made with `text` and `fill`. data: JSON, which the scripts read from
    `document.getElementById("data").textContent`. scripts, styles: names of files in report/assets, in their order.
    Only these scripts run and only these styles apply: they are allowed by their hashes, so neither `onclick=` nor
    `style=` in the body works. Raises ValueError for data with NaN or an infinity.
    """
    code, looks = [_inlined(name) for name in scripts], [_inlined(name) for name in styles]
    policy = _POLICY.format(scripts=_hashes(code), styles=_hashes(looks))
    return _DOCUMENT.format(
        policy=policy,
        title=text(title),
        styles="\n".join(f"<style>{look}</style>" for look in looks),
        body=body,
        data=_json(data),
        scripts="\n".join(f"<script>{each}</script>" for each in code),
    )


def text(said: object) -> str:
    """Anything as text within HTML, also within a quoted attribute; what cannot be shown becomes U+FFFD."""
    shown = "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in str(said)
    )
    return escape(shown, quote=True)


def fill(name: str, /, **parts: str) -> str:
    """The template report/assets/`name` with each $part put in; the parts are HTML already."""
    return Template(asset(name)).substitute(parts)


def packed(values: np.ndarray) -> str:
    """The bytes of an array, little-endian, in base64: a page decodes them to a Float32Array or a Float64Array."""
    little = values.dtype.newbyteorder("<")
    return base64.b64encode(np.ascontiguousarray(values, little).tobytes()).decode("ascii")


@lru_cache(maxsize=32)
def asset(name: str) -> str:
    """The text of the file report/assets/`name`."""
    return files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


@lru_cache(maxsize=32)
def _inlined(name: str) -> str:
    """A script or style, behind its licence where it is somebody else's: every page is a copy of it."""
    licence = files(__package__).joinpath("assets", name.split(".")[0] + ".LICENSE")
    said = f"/*\n{licence.read_text(encoding='utf-8')}\n*/\n" if licence.is_file() else ""
    code = said + asset(name)
    assert not any(end in code for end in ("</script", "</style", "<!--")), name
    return code


def _hashes(inlined: Sequence[str]) -> str:
    digests = (base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in inlined)
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"


def _json(data: Any) -> str:
    """JSON that no name in it can break out of; beyond ASCII everything is escaped, U+2028 and surrogates too."""
    found = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return found.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
