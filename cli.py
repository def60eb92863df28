"""The roof: every command of vacli is its options and one call; what is heavy is imported inside."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from . import VacliError, __version__, printable
from .cli_extract import demo, encoders, extract, finetune, pretrain
from .cli_predict import plot, predict, report
from .cli_store import store as store_commands
from .cli_temporal import evaluate, heads, sweep, train


class _Told(click.Group):
    """A user's mistake is one line and exit code 1; Ctrl-C says how to go on. Never a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except VacliError as e:
            raise click.ClickException(printable(" ".join(str(e).split()))) from e
        except KeyboardInterrupt:
            click.echo("\nstopped; what is done is kept, the same command goes on from there", err=True)
            sys.exit(130)


@click.group(cls=_Told, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vacli")
def main() -> None:
    """Videos of people in, valence and arousal for every frame out.

    \b
    make features DATA=dir/          (or: vacli extract dir/)
    vacli train --head mamba
    vacli predict --video dir/
    """
    # Threads that wait for each other in a busy loop halve the speed beside any other work; torch reads this once.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


for _command in (
    demo, extract, pretrain, finetune, train, sweep, evaluate, predict, report, plot, heads, encoders, store_commands,
):  # fmt: skip
    main.add_command(_command)
