"""The commands of stage two, which read nothing but the store: train, sweep, evaluate, heads."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import click

from . import VacliError
from .cli_shell import JSON, complete_folders, complete_heads, complete_runs, print_json, say
from .cli_store import STORE

RUNS = click.option(
    "--runs", default="runs", show_default=True, shell_complete=complete_folders,
    help="The folder of trained runs.",
)  # fmt: skip
RUN = click.option(
    "--run", "run_path", shell_complete=complete_runs,
    help="A run folder, its name, or a head; of several folds too.  [default: the newest]",
)  # fmt: skip


def _on_heads(command: Any) -> Any:
    """The options on what is trained."""
    options = (
        click.option(
            "--head", default="mamba", show_default=True, shell_complete=complete_heads,
            help="A preset (`vacli heads`) or a file my.toml.",
        ),
        STORE,
        RUNS,
        click.option(
            "--stream", "streams", multiple=True, help="A track instead of the preset's. May be repeated."
        ),
        click.option(
            "--set", "changes", multiple=True, metavar="KEY=VALUE",
            help="A key of the preset, as train.epochs=10, causal=false or decode.2.mamba.layers=2.",
        ),
        click.option("--name", help="The run's name.  [default: head and a hash of all settings]"),
        click.option("--seed", default=0, show_default=True),
    )  # fmt: skip
    for option in reversed(options):  # the help lists the last one put on first
        command = option(command)
    return command


@click.command()
@_on_heads
@click.option(
    "--folds", type=int, help="Train so many folds (the papers: 6); fold 0 is the data set's own split."
)
@click.option("--fold", type=int, help="Train this one of the folds only, counted from 0.")
@click.option(
    "--subjects", type=click.Path(path_type=Path),
    help="A file of lines video,subject: nobody is in two folds.",
)  # fmt: skip
@JSON
def train(
    head: str,
    store: str,
    runs: str,
    streams: tuple[str, ...],
    changes: tuple[str, ...],
    name: str | None,
    seed: int,
    folds: int | None,
    fold: int | None,
    subjects: Path | None,
    as_json: bool,
) -> None:
    """Train a head on the labelled videos of the store. Interrupted, the same command goes on."""
    from .store import Store
    from .temporal.folds import read_subjects, train_folds
    from .temporal.preset import load_preset
    from .temporal.smoothing import in_words
    from .temporal.train import train as run

    preset = load_preset(head, _changes(changes), list(streams))
    tell = functools.partial(say, err=as_json)
    how: dict[str, Any] = {"runs": runs, "name": name, "seed": seed, "tell": tell}
    if folds is None and fold is None:
        if subjects:
            raise VacliError("--subjects is for --folds; without it the data set's own split is used")
        trained = run(Store(store), preset, **how)
        found = trained.about["figures"]
        if as_json:
            print_json({"run": trained.path, "figures": found, "smoothing": trained.smoothing})
            return
        click.echo(
            f"{trained.path}: validation CCC V {found['valence']:.3f} A {found['arousal']:.3f} "
            f"mean {found['mean']:.3f}, smoothed ({in_words(trained.smoothing)})"
        )
        return
    of = read_subjects(subjects) if subjects else None
    done = train_folds(
        Store(store), preset, folds=6 if folds is None else folds, only=fold, subjects=of, **how
    )
    print_json(done.as_json()) if as_json else click.echo(done.table())


@click.command()
@_on_heads
@click.option(
    "--over", "space", multiple=True, required=True, metavar="KEY=VALUES",
    help="What to try: train.lr=1e-5..1e-3:log, decode.2.mamba.layers=2..6, or a list as fuse=sum,concat.",
)  # fmt: skip
@click.option("--trials", default=20, show_default=True, help="Finished trials, over all processes together.")
@JSON
def sweep(
    changes: tuple[str, ...],
    streams: tuple[str, ...],
    store: str,
    space: tuple[str, ...],
    as_json: bool,
    **how: Any,
) -> None:
    """Search the keys of a preset for the best validation CCC; the same command goes on, in any number of processes."""
    from .store import Store
    from .temporal.sweep import sweep as run

    run(
        Store(store),
        space=list(space),
        changes=_changes(changes),
        streams=list(streams),
        tell=functools.partial(say, err=as_json),
        show=lambda found: print_json(found.as_json()) if as_json else click.echo("\n".join(found.lines())),
        **how,
    )


@click.command()
@RUN
@RUNS
@STORE
@click.option("--no-smooth", is_flag=True, help="Judge the raw curves.")
@JSON
def evaluate(run_path: str | None, runs: str, store: str, no_smooth: bool, as_json: bool) -> None:
    """Judge a trained run by its validation videos, beside baselines on the same features and split."""
    from .store import Store
    from .temporal.evaluate import evaluate as run
    from .temporal.folds import Folds, open_any

    trained = open_any(run_path, runs)
    if isinstance(trained, Folds):
        if no_smooth:
            raise VacliError(f"--no-smooth judges one run: choose a fold, as --run {trained.path}/fold-0")
        print_json(trained.as_json()) if as_json else click.echo(trained.table())
        return
    report = run(trained, Store(store), smooth=not no_smooth)
    print_json(report.as_json()) if as_json else click.echo("\n".join(report.lines()))


@click.command()
@click.argument("name", required=False, shell_complete=complete_heads)
@JSON
def heads(name: str | None, as_json: bool) -> None:
    """List the presets, or print the one called NAME."""
    from .temporal.preset import load_preset, preset_names, preset_text

    if as_json:
        named = {known: load_preset(known) for known in ([name] if name else preset_names())}
        print_json({known: preset.model_dump() for known, preset in named.items()})
        return
    if name:
        click.echo(preset_text(name), nl=False)
        return
    for known in preset_names():
        preset = load_preset(known)
        click.echo(f"{known:<15} streams {', '.join(preset.streams):<24} {preset.source}")


def pair(text: str, option: str) -> tuple[str, str]:
    """KEY=VALUE as (KEY, VALUE). Raises VacliError for anything else."""
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise VacliError(f"{option} {text}: wanted KEY=VALUE")
    return key, value


def _changes(changes: tuple[str, ...]) -> dict[str, str]:
    return dict(pair(c, "--set") for c in changes)
