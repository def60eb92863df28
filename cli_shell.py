"""What every command has in common: --quiet and -v, exit codes, how mishaps are told, and completion by the shell."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from . import VacliError, plain, printable

_EPILOG = """\b
Exit codes:
  0    all well
  1    something asked for could not be had: a broken video, a mistake that one line tells how to mend
  2    wrong usage: an unknown command or option
  130  stopped by Ctrl-C; what is done is kept
"""
_QUIET, _VERBOSE = (
    "vacli.quiet",
    "vacli.verbose",
)  # in the meta of a click context, which a command and its group share
_NO_BARS = (
    "TQDM_DISABLE"  # environment variable that tqdm reads when it is imported, also in worker processes
)


class Shell(click.Group):
    """The group of all commands: each takes --quiet and -v, before its name or behind it, and ends in one exit code.

    A user's mistake is one line and exit code 1, never a traceback. Ctrl-C says how to go on: 130. A bug of ours is one
    line too, which asks for -v: with it, the traceback stands above.
    """

    def __init__(self, *args: Any, **attributes: Any) -> None:
        attributes.setdefault("epilog", _EPILOG)
        super().__init__(*args, **attributes)
        self.params += _switches()

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command, or a group of them, and give it the switches that all have."""
        for command in (cmd, *(cmd.commands.values() if isinstance(cmd, click.Group) else ())):
            command.params += _switches()
        super().add_command(cmd, name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\nstopped; what is done is kept, the same command goes on from there", err=True)
            sys.exit(130)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as e:
            if (
                getattr(e, "errno", None) == errno.EPIPE
            ):  # whoever read our output has left: click ends us silently
                raise
            if ctx.meta.get(_VERBOSE) and not isinstance(e, VacliError):
                traceback.print_exc()
            raise click.ClickException(printable(_told(e))) from e


def _told(e: Exception) -> str:
    """A mishap in one line, with what mends it."""
    text = " ".join(str(e).split())
    if isinstance(e, VacliError):
        return text
    if isinstance(e, MemoryError):
        return "out of memory; close other programs, or give it less at once; what is done is kept"
    if isinstance(e, OSError):
        return f"{text}; mend that and run again: what is done is kept (-v tells where it happened)"
    if isinstance(e, ModuleNotFoundError):
        return f"{text}: this installation is not whole; pip install vacli again"
    return f"{type(e).__name__}: {text}; this is a bug in vacli: run again with -v and report what it tells"


# ---- --quiet and -v ------------------------------------------------------------------------------------------


def _switches() -> list[click.Option]:
    return [
        click.Option(
            ["--quiet", "-q"], is_flag=True, expose_value=False, callback=_be_quiet,
            help="No progress bars and no notes: only what was asked for, warnings and errors.",
        ),
        click.Option(
            ["--verbose", "-v"], count=True, expose_value=False, callback=_be_verbose,
            help="Log to stderr what is done; -vv: more, also what the decoders say.",
        ),
    ]  # fmt: skip


def say(line: str, err: bool = False) -> None:
    """A line that informs and was not asked for: not told under --quiet. err: to stderr."""
    context = click.get_current_context(silent=True)
    if context is None or not context.meta.get(_QUIET):
        click.echo("\n".join(map(printable, line.split("\n"))), err=err)


def _be_quiet(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.meta.get(_QUIET):
        ctx.meta[_QUIET] = True
        _without_bars(ctx)


def _without_bars(ctx: click.Context) -> None:
    if _NO_BARS not in os.environ:
        os.environ[_NO_BARS] = "1"
        ctx.find_root().call_on_close(lambda: os.environ.pop(_NO_BARS, None))


def _be_verbose(ctx: click.Context, _: click.Parameter, times: int) -> None:
    if not times or ctx.resilient_parsing:
        return
    if not ctx.meta.get(_VERBOSE):
        root, ours, handler = logging.getLogger(), logging.getLogger(__package__), _AboveTheBars()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
        before = root.level, ours.level
        root.addHandler(handler)

        def undo() -> None:
            root.removeHandler(handler)
            root.setLevel(before[0])
            ours.setLevel(before[1])

        ctx.find_root().call_on_close(undo)
        if not sys.stderr.isatty():  # in a file bars and lines would tear each other
            _without_bars(ctx)
    times = ctx.meta[_VERBOSE] = times + ctx.meta.get(_VERBOSE, 0)
    logging.getLogger(__package__).setLevel(logging.DEBUG if times > 1 else logging.INFO)
    if times > 1:
        logging.getLogger().setLevel(logging.INFO)
        _let_the_decoders_speak(ctx)


class _AboveTheBars(logging.Handler):
    """Lines on stderr that do not tear a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        try:
            text = self.format(record).splitlines()  # of a traceback several
            tqdm.write("\n".join(map(printable, text)), file=sys.stderr)
        except Exception:
            self.handleError(record)


def _let_the_decoders_speak(ctx: click.Context) -> None:
    """libav writes to stderr itself: through Python's logging its threads would wait for the GIL, and may deadlock."""
    try:
        import av.logging
    except ImportError:  # a broken installation, as `vacli doctor -vv` may have to tell
        return
    level = av.logging.get_level()
    ctx.find_root().call_on_close(lambda: av.logging.set_level(level))
    av.logging.restore_default_callback()
    av.logging.set_libav_level(av.logging.INFO)


# ---- tables for programs -------------------------------------------------------------------------------------

JSON = click.option(
    "--json", "as_json", is_flag=True, help="For programs: JSON on stdout, all else on stderr."
)


def print_json(tree: Any) -> None:
    """Strict JSON on stdout: what is no number is null, a path is text."""
    click.echo(json.dumps(plain(tree), indent=1, allow_nan=False))


# ---- completion ----------------------------------------------------------------------------------------------

_INSTALL = {
    "bash": 'bash: put  eval "$(vacli completion bash)"  into ~/.bashrc',
    "zsh": 'zsh: put  eval "$(vacli completion zsh)"  into ~/.zshrc, below compinit',
    "fish": "fish: vacli completion fish > ~/.config/fish/completions/vacli.fish",
}


@click.command()
@click.argument("shell", type=click.Choice(list(_INSTALL)))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script by which SHELL completes commands, options, files, heads, runs and encoders; it says how."""
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(ctx.find_root().command, {}, "vacli", "_VACLI_COMPLETE").source().strip())
    click.echo(f"# {_INSTALL[shell]}")


def complete_heads(_: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The presets that come with vacli; files where none begins so."""
    presets = Path(__file__).parent / "temporal" / "presets"
    return _offered((p.stem for p in presets.glob("*.toml")), incomplete, "file")


def complete_runs(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What lies in the folder of runs, its folds and trials too; folders where none begins so."""
    runs = Path(ctx.params.get("runs") or "runs")
    files = [p for glob in ("*/run.json", "*/folds.json", "*/*/run.json") for p in runs.glob(glob)]
    return _offered((p.parent.relative_to(runs).as_posix() for p in files), incomplete, "dir")


def complete_encoders(_: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The encoders of the table, also behind NAME=."""
    from .extract import ENCODERS

    name, sign, _kind = incomplete.rpartition("=")
    return _offered((f"{name}{sign}{encoder}" for encoder in ENCODERS), incomplete, None)


def complete_folders(_: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Folders, for what may be an address too and so is no click.Path."""
    return [CompletionItem(incomplete, type="dir")]


def _offered(names: Any, incomplete: str, files: str | None) -> list[CompletionItem]:
    found = sorted({name for name in names if name.startswith(incomplete)})
    first = [CompletionItem(incomplete, type=files)] if files else []  # bash forgets what stands before it
    return [*first, *map(CompletionItem, found)]
