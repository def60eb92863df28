"""The commands as a user types them, in the tests: what they say, and that they end as they should."""

from __future__ import annotations

from click.testing import CliRunner, Result
from vacli.cli import main

TINY = ["--set", "train.epochs=1", "--set", "encode.*.blocks=[{linear={dim=8}}]"]
TINY += ["--set", "decode=[{mamba={layers=1,state=2,conv=2,expand=1}}]"]


def vacli(*words: object, fails: bool = False) -> Result:
    result = CliRunner().invoke(main, [str(w) for w in words])
    told = f"{result.output}\n{result.exception!r}"
    assert result.exit_code == (1 if fails else 0), told
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), told
    return result
