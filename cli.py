"""The roof: every command of vacli is its options and one call; what is heavy is imported inside."""

from __future__ import annotations

import os

import click

from . import __version__
from .cli_doctor import doctor
from .cli_extract import demo, encoders, extract, finetune, pretrain
from .cli_predict import plot, predict, report
from .cli_shell import Shell, completion
from .cli_store import store as store_commands
from .cli_submit import submit
from .cli_temporal import evaluate, heads, sweep, train


@click.group(cls=Shell, context_settings={"help_option_names": ["-h", "--help"]})
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
    demo, doctor, extract, pretrain, finetune, train, sweep, evaluate, predict, report, plot, submit, heads, encoders,
    store_commands, completion,
):  # fmt: skip
    main.add_command(_command)
