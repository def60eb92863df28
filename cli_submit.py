"""The command `vacli submit`: writes a file for the ABAW challenge, and checks any before it costs a try."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import printable
from .cli_shell import JSON, print_json, say

if TYPE_CHECKING:
    from .store.submission import Finding, Written

_TRIES = "note: a team has five submissions: check the file, and look at the curves, before you send it"
_UNLIKE = (
    "{}: the sample goes to frame {}, its curve has {} rows: is it the same, whole video? "
    "predict it again with `vacli predict --video FILE`"
)
_EULA = (
    "note: Aff-Wild2 is lent under its EULA: annotations, and features made of the videos, must not be passed on; "
    "this file is for the organisers alone"
)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("predictions"))
@click.option("--task", type=click.Choice(["va", "expr", "au"]), default="va", show_default=True)
@click.option(
    "--sample", type=click.Path(path_type=Path), help="The organisers' sample file: its rows, in its order."
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("submission.txt"), show_default=True)
@click.option(
    "--check", type=click.Path(path_type=Path), help="Write nothing: tell what is wrong with this file."
)
@JSON
def submit(
    folder: Path, task: str, sample: Path | None, out: Path, check: Path | None, as_json: bool
) -> None:
    """Write the curves of FOLDER as a file for the ABAW challenge, or check any such file.

    \b
    vacli submit --task va --sample official_sample.txt
    vacli submit --check submission.txt --sample official_sample.txt

    A team has five submissions. What is written is checked, as --check would: that takes files of all three tasks
    (VA, EXPR, AU; told by the header), ends with 1 where something is wrong, and without --sample cannot know which
    rows there must be. Aff-Wild2's EULA forbids passing on its annotations and features made of its videos.
    """
    from .store.submission import Finding, check_submission, write_submission

    unlike: list[Finding] = []
    if check is None:
        if sample is None:
            raise click.UsageError(
                "which rows? --sample FILE (the organisers'); or --check FILE to check one"
            )
        written = write_submission(folder, sample, out, task)
        _tell_written(written, to_stderr=as_json)
        unlike = [Finding(_UNLIKE.format(video, *ends), True, 1) for video, ends in written.unlike.items()]
    findings = [*unlike, *check_submission(check or out, sample)]
    _tell_findings(check or out, findings, sample, as_json)
    if check is None:
        say(_TRIES, err=True)
    say(_EULA, err=True)
    sys.exit(any(finding.wrong for finding in findings))


def _tell_written(written: Written, to_stderr: bool) -> None:
    click.echo(
        f"{printable(str(written.path))}: {written.rows} rows of {written.videos} videos", err=to_stderr
    )
    for counts, what in (
        (written.held, "frame(s) beyond the end of the curve hold its last row"),
        (written.empty, "row(s) of the curve have no value and were given the nearest"),
    ):
        for video, count in counts.items():
            click.echo(f"warning: {printable(video)}: {count} {what}", err=True)
    if written.clipped:
        click.echo(f"warning: {written.clipped} values were outside [-1, 1] and were clipped", err=True)


def _tell_findings(path: Path, findings: list[Finding], sample: Path | None, as_json: bool) -> None:
    if as_json:
        from dataclasses import asdict

        found = [
            {**asdict(one), "where": [{"line": n, "text": text} for n, text in one.where]} for one in findings
        ]
        print_json({"file": path, "findings": found})
        return
    for one in findings:
        click.echo(f"{'wrong' if one.wrong else 'warning'}: {one.count} x {printable(one.what)}")
        for number, text in one.where:
            click.echo(f"  line {number}: {text}")
        if one.count > len(one.where):
            click.echo(f"  and {one.count - len(one.where)} more")
    if not any(one.wrong for one in findings):
        compared = "" if sample else "; without --sample nobody can say whether all rows are there"
        click.echo(f"{printable(str(path))}: nothing wrong found{compared}")
