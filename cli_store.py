"""The commands `vacli store ...`: each is its options and one call; what is heavy is imported inside."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import VacliError, printable
from .cli_shell import JSON, complete_folders, print_json, say

if TYPE_CHECKING:
    from .store import Store
    from .store.hdf5_import import Figures
    from .store.keeper import Doomed

STORE = click.option(
    "--store", default="features.zarr", show_default=True, shell_complete=complete_folders,
    help="The feature store: a folder, or s3://...",
)  # fmt: skip
_YES = click.option("--yes", is_flag=True, help="Do not ask.")


@click.group()
def store() -> None:
    """Look at a feature store, look after it, share it."""


@store.command("ls")
@STORE
@JSON
def store_ls(store: str, as_json: bool) -> None:
    """Every video with the rows of its tracks, then every recipe with its size."""
    from .store import Store
    from .store.show import listing, table

    videos = listing(Store(store))
    print_json(videos) if as_json else click.echo("\n".join(table(videos)))


@store.command("show")
@click.argument("video")
@STORE
@JSON
def store_show(video: str, store: str, as_json: bool) -> None:
    """Every track of VIDEO: its times, valid rows, values and recipe, and a small plot."""
    from .store import Store
    from .store.show import show, shown

    opened = Store(store)
    print_json(shown(opened, video)) if as_json else click.echo("\n".join(show(opened, video)))


@store.command("verify")
@STORE
@click.option(
    "--repair", is_flag=True, help="Set the damaged ones aside, so that the next extraction redoes them."
)
@JSON
def store_verify(store: str, repair: bool, as_json: bool) -> None:
    """Read every track with its checksums; names the damaged ones."""
    from tqdm import tqdm

    from .store import Store, keeper
    from .store.show import size_text

    opened = _to_change(store) if repair else Store(store)
    entries, nbytes, damaged = set(opened.entries()), 0, {}
    calm = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(total=len(entries), desc="verify", unit="track", mininterval=calm, dynamic_ncols=True) as bar:
        for name, size, what in opened.verify():
            bar.update(name in entries)
            nbytes += size
            bar.set_postfix_str(size_text(nbytes), refresh=False)
            if what:
                damaged[name] = what
                bar.write(what, file=sys.stderr)
    mended = [name for name in damaged if repair and keeper.repair(opened, name)]
    if as_json:
        print_json({"tracks": len(entries), "bytes": nbytes, "damaged": damaged, "set_aside": mended})
    else:
        click.echo(f"{len(entries)} tracks read, {size_text(nbytes)}, {len(damaged)} damaged")
    if repair and damaged:
        say(
            f"{len(mended)} of {len(damaged)} set aside; run `vacli extract` again to make them anew",
            err=as_json,
        )
        sys.exit(len(mended) < len(damaged))
    if damaged:
        click.echo("set them aside with `vacli store verify --repair`, then extract again", err=True)
        sys.exit(1)


@store.command("gc")
@STORE
@click.option(
    "--runs", multiple=True, type=click.Path(path_type=Path), default=[Path("runs")], show_default=True,
    help="Where trained runs lie, whose features stay. May be repeated.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what would go, and remove nothing.")
@_YES
@JSON
def store_gc(store: str, runs: tuple[Path, ...], dry_run: bool, yes: bool, as_json: bool) -> None:
    """Remove what nobody needs: leftovers of killed runs, damaged tracks, recipes no video and no run refers to."""
    from .store import Store, keeper
    from .store.show import size_text

    opened = Store(store) if dry_run else _to_change(store)
    found = keeper.garbage(opened, list(runs))
    if lost := len(keeper.lost_names(opened)):
        click.echo(
            f"note: the names of {lost} videos were set aside as damaged, so no recipe is removed: extract (or import) "
            "them again first",
            err=True,
        )
    for item in found:
        tracks = f"{item.entries} tracks, " if item.path is None else ""
        click.echo(f"{item.name}  {tracks}{size_text(item.nbytes)}: {item.why}", err=as_json)
    total, freed = size_text(sum(item.nbytes for item in found)), 0
    if dry_run or not found:
        click.echo(f"{len(found)} things may go, {total}" if found else "nothing to remove", err=as_json)
    else:
        _ask(yes, f"remove these {len(found)} things, {total}?")
        freed = keeper.gc(opened, found, list(runs))
        click.echo(f"freed {size_text(freed)}", err=as_json)
    if as_json:
        things = [{"name": i.name, "why": i.why, "tracks": i.entries, "bytes": i.nbytes} for i in found]
        print_json({"garbage": things, "freed_bytes": freed})


@store.command("du")
@STORE
@JSON
def store_du(store: str, as_json: bool) -> None:
    """How much each recipe takes."""
    from .store import Store, keeper
    from .store.show import size_text

    found = keeper.usage(Store(store))
    if as_json:
        print_json({name: {"tracks": count, "bytes": nbytes} for name, (count, nbytes) in found.items()})
        return
    for name, (count, nbytes) in sorted(found.items(), key=lambda pair: -pair[1][1]):
        click.echo(f"{size_text(nbytes):>10}  {count:>7}  {name}")
    click.echo(
        f"{size_text(sum(n for _, n in found.values())):>10}  {sum(c for c, _ in found.values()):>7}  total"
    )


@store.command("rm")
@click.argument("videos", nargs=-1, required=True, metavar="ID_OR_FILE...")
@STORE
@click.option("--track", "tracks", multiple=True, help="Only this track of the ids. May be repeated.")
@click.option("--dry-run", is_flag=True, help="Say what would go, and remove nothing.")
@_YES
def store_rm(videos: tuple[str, ...], store: str, tracks: tuple[str, ...], dry_run: bool, yes: bool) -> None:
    """Remove videos: all that the store keeps of them, also what predictions left there, and their names.

    ID_OR_FILE is an id of `vacli store ls`, or the video file (if its name is an id too: ./NAME). Of a file, all that
    was made of its bytes goes, under whatever id; of an id, what no other id shares.

    Not removed: what was predicted (the folder predictions/), the videos, copies, exports and other machines' caches of
    the store, and trained runs, with what they learned from the video; they can no longer be evaluated on it. A run
    that is at work on the video stores it again: let it end first.
    """
    from .store import Store, keeper
    from .store.show import size_text

    opened = Store(store) if dry_run else _to_change(store)
    known = opened.videos()
    meant = [Path(v) if v not in known and os.path.isfile(v) else v for v in videos]
    found = keeper.doomed(opened, meant, tracks)
    for line in _told_of(found):
        click.echo(printable(line))
    if dry_run:
        return
    _ask(yes, printable(f"remove {', '.join(videos)} from {store}?"))
    gone = keeper.remove(opened, meant, tracks)
    click.echo(f"{len(gone)} tracks removed, {size_text(found.nbytes)}")


def _told_of(found: Doomed) -> Iterator[str]:
    """What would be removed and what would stay, in lines."""
    from .store.show import size_text

    unnamed = f", {found.unnamed} of them under no name" if found.unnamed else ""
    aside = f", and {len(found.aside)} set aside as damaged" if found.aside else ""
    yield f"{len(found.entries)} tracks{unnamed}{aside}, {size_text(found.nbytes)}"
    if found.names:
        yield f"of {', '.join(found.names)}"
    if found.kept:
        others = ", ".join(sorted(set(found.kept.values())))
        yield f"{len(found.kept)} more stay, that {others} shares: give that id too, or the video file"


@store.command("export")
@click.argument("out", type=click.Path(path_type=Path))
@STORE
def store_export(out: Path, store: str) -> None:
    """Copy the whole store into one HDF5 file OUT, which h5py reads without vacli. Interrupted, it goes on."""
    from .store import Store
    from .store.hdf5 import export

    figures = export(Store(store), out, tell=lambda line: say(line, err=True))
    _tell_figures(f"{out}: ", figures)


@store.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@STORE
@click.option(
    "--track", help="SOURCE holds features or labels of others; their track's name (labels: label.va)."
)
@click.option(
    "--times", help="Their times: 25Hz, `frames`, a column's name, or a folder of times.  [default: found]"
)
@click.option("--columns", help="Which columns or which array, as a,b,c.  [default: all numbers]")
@click.option("--scale", help="The scale of labels, as 1..9; they become [-1, 1].")
def store_import(
    source: Path, store: str, track: str | None, times: str | None, columns: str | None, scale: str | None
) -> None:
    """Bring in an export of `vacli store export`, or with --track anybody's features and labels.

    With --track, SOURCE is a folder with a file for each video (.csv .tsv .txt, also .gz; .npy .npz .h5 .parquet).
    """
    from .store import Store
    from .store.foreign import import_features
    from .store.hdf5 import LICENCE
    from .store.hdf5_import import import_export

    if not source.exists():
        raise VacliError(f"no such file or folder: {source}")
    if track is None:
        if source.is_dir() or times or columns or scale:
            raise VacliError(
                f"{source}: say what the features are to be called, as --track openface (labels: --track label.va)"
            )
        say(f"note: {LICENCE}", err=True)
        _tell_figures(f"{store}: ", import_export(source, Store(store, create=True)))
        return
    names = [name.strip() for name in columns.split(",")] if columns else []
    done = import_features(source, Store(store, create=True), track, times, names, scale)
    for note in done.notes:
        say(f"note: {note}", err=True)
    stored = sum(what == "stored" for what in done.videos.values())
    click.echo(f"{track}: {stored} stored, {len(done.videos) - stored} kept, {len(done.problems)} refused")
    _list_problems([f"{video_id}: {why}" for video_id, why in done.problems.items()])


# ---- told alike by several ---------------------------------------------------------------------------------------


def _to_change(place: str) -> Store:
    """A store that is there, opened for writing; a mistyped one is refused and not made."""
    from .store import Store

    Store(place)
    return Store(place, create=True)


def _ask(yes: bool, question: str) -> None:
    if not yes:
        if not sys.stdin.isatty():
            raise VacliError(f"{question} there is nobody to ask: say --yes")
        click.confirm(question, abort=True)


def _tell_figures(start: str, figures: Figures) -> None:
    for note in figures.notes:
        say(f"note: {note}", err=True)
    tombstones = f", {figures.tombstones} failures noted" if figures.tombstones else ""
    click.echo(
        f"{start}{figures.tracks} tracks copied{tombstones}, {figures.there} were there, of {figures.videos} videos"
    )
    _list_problems(figures.problems)


def _list_problems(problems: list[str]) -> None:
    if problems:
        click.echo(f"{len(problems)} had a problem:", err=True)
        for problem in problems:
            click.echo(f"  {problem}", err=True)
        sys.exit(1)
