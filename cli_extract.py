"""The commands of stage one: demo, extract, pretrain, finetune, encoders; and what they share with predict."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import VacliError, printable
from .cli_shell import JSON, complete_encoders, print_json, say
from .cli_store import STORE
from .cli_temporal import pair

if TYPE_CHECKING:
    from .extract.datasets import Sample
    from .extract.encoder import Encoder
    from .extract.run import Outcome

OPTIONS = click.option(
    "-o", "options", multiple=True, metavar="NAME.KEY=VALUE", help="An encoder's option, as mae.weights=FILE."
)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--train", default=20, show_default=True, help="Training videos.")
@click.option("--validation", default=6, show_default=True, help="Validation videos, of other puppets.")
@click.option("--length-s", default=60.0, show_default=True, help="Seconds of each video.")
@click.option("--rate-hz", default=10.0, show_default=True, help="Frames per second.")
@click.option("--seed", default=0, show_default=True)
def demo(folder: Path, train: int, validation: int, length_s: float, rate_hz: float, seed: int) -> None:
    """Make a data set of talking puppets with known valence and arousal, in the Aff-Wild2 layout."""
    from tqdm import tqdm

    from .extract.synthetic import make_puppets

    with tqdm(total=train + validation, desc="puppets", unit="video", mininterval=1) as bar:
        ids = make_puppets(
            folder, train, validation, length_s, rate_hz, seed, on_video=lambda _: bar.update()
        )
        bar.update(len(ids) - bar.n)
    say(f"{len(ids)} puppet videos in {folder}")


def _complete_people(_: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    return [who for who in ("main", "all", "left", "right") if who.startswith(incomplete)]


def on_people(command: Any) -> Any:
    """The options on whose face is read, and how faces are found."""
    for option in (
        click.option(
            "--person", default="main", show_default=True, metavar="main|all|left|right",
            shell_complete=_complete_people,
            help="Whose face: the main one, everybody's (a curve for each), of two the left or right one.",
        ),
        click.option(
            "--detector", default="mtcnn", show_default=True,
            help="What finds faces: mtcnn, or a YuNet .onnx file (fast).",
        ),
        click.option(
            "--every", default=1, show_default=True, type=click.IntRange(min=1),
            help="Look for faces in every n-th frame and follow them between.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@STORE
@click.option(
    "--encoder", "names", multiple=True, default=("mae", "logmel"), show_default=True, shell_complete=complete_encoders,
    help="An encoder by name, or NAME=ENCODER to call its track NAME. May be repeated.",
)  # fmt: skip
@OPTIONS
@on_people
@click.option(
    "--shard", metavar="I/N", help="Only part I of N of the videos: one for each of N processes or machines."
)
@click.option(
    "--crops-rate-hz", default=30.0, show_default=True, help="Frame rate of aligned crops without a video."
)
@click.option(
    "--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True, help="What runs it."
)
@click.option("--workers", type=click.IntRange(min=1), help="Of Ray.  [default: one a GPU, or for four CPUs]")
def extract(
    data: Path,
    store: str,
    names: tuple[str, ...],
    options: tuple[str, ...],
    person: str,
    detector: str,
    every: int,
    shard: str | None,
    crops_rate_hz: float,
    engine: str,
    workers: int | None,
) -> None:
    """Compute the features of every video in DATA that the store does not have yet.

    DATA is a folder of videos, one video, or the Aff-Wild2 layout (its aligned crops and annotations are used).
    """
    from .extract.datasets import find
    from .extract.encoder import make_encoders
    from .extract.people import People
    from .extract.run import extract as run
    from .extract.run import shard as part_of
    from .store import Store

    if workers and engine != "ray":
        raise VacliError(
            "--workers is for --engine ray; several local processes: --shard 1/2 and --shard 2/2"
        )
    samples = of_person(find(data, crops_rate_hz), person)
    samples = part_of(samples, shard) if shard else samples
    if any(s.crops for s in samples) and not (data / "puppets.json").exists():
        say("note: if this is Aff-Wild2: its licence forbids sharing features derived from it", err=True)
    opened = Store(store, create=True)
    encoders = make_encoders(names, by_name(options), opened.fingerprints)
    people = People(detector, every)
    say_notes(encoders)
    with told_when_stopped(samples, store) as outcomes:
        if engine == "ray":
            from .extract.ray_engine import extract_with_ray

            extract_with_ray(samples, encoders, opened, people, workers, say, outcomes)
        else:
            run(samples, encoders, opened, people=people, tell=say, outcomes=outcomes)
    summarise(outcomes, store)


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("weights/mae-faces.safetensors"), show_default=True
)
@STORE
@click.option("--model", help="A timm ViT; by default the one of the weights, else the MAE ViT-L/16.")
@click.option("--weights", help="Where to start; looked for as by `vacli extract` if absent.")
@click.option("--from-scratch", is_flag=True, help="Start from random weights.")
@click.option("--size", type=int, help="Input pixels (with --from-scratch).")
@click.option("--frames-per-video", default=300, show_default=True, help="Evenly spaced faces of each video.")
@click.option("--batch", default=256, show_default=True, help="Crops of a batch, over all GPUs.")
@click.option("--epochs", default=100, show_default=True)
@click.option(
    "--lr", type=float, help="Learning rate.  [default: 1.5e-4 for 256 crops a batch; from scratch 2e-3]"
)
@click.option("--mask", default=0.75, show_default=True, help="Share of the patches that is hidden.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
    help="What to compute in.  [default: bfloat16 on a GPU, else float32]",
)  # fmt: skip
@click.option("--seed", default=0, show_default=True)
@click.option("--note", help="A warning that travels with the weights, shown wherever they are used.")
def pretrain(data: Path, out: Path, store: str, **how: Any) -> None:
    """Train a masked autoencoder on the faces in DATA, without labels; tune the result with `vacli finetune --weights`.

    Stopped, the same command goes on. Several GPUs: torchrun --nproc-per-node 4 --no-python vacli pretrain ...
    """
    from .extract.datasets import find
    from .extract.pretrain import pretrain as run
    from .store import Store

    figures = run(find(data), Store(store, create=True), out, **how)
    if os.environ.get("RANK", "0") == "0":  # one of the processes of torchrun speaks
        click.echo(
            f"{out}: loss of held-out faces {figures['loss']:.3f} (1: no better than each patch's mean); "
            f"tune it with vacli finetune --weights {out}"
        )


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("weights/mae-tuned.safetensors"), show_default=True
)
@STORE
@click.option("--model", help="A timm ViT; by default the one of the weights, else the MAE ViT-L/16.")
@click.option("--weights", help="Where to start; looked for as by `vacli extract` if absent.")
@click.option("--from-scratch", is_flag=True, help="Start from random weights (for small models only).")
@click.option(
    "--freeze", type=int, help="Lower blocks left as they are.  [default: two thirds; none from scratch]"
)
@click.option("--size", type=int, help="Input pixels (with --from-scratch).")
@click.option(
    "--frames-per-video", default=300, show_default=True, help="Labelled frames of each video in an epoch."
)
@click.option(
    "--sampling", type=click.Choice(["even", "time", "balanced"]), default="even", show_default=True,
    help="even: the same evenly spaced frames; time: a random one of each stretch of time, anew every epoch; "
    "balanced: as time, all regions of the valence-arousal plane alike.",
)  # fmt: skip
@click.option(
    "--augment", type=click.Choice(["none", "light", "full"]), default="light", show_default=True,
    help="light: mirror and shift; full: zoom, colour and erasing too.",
)  # fmt: skip
@click.option("--loss", type=click.Choice(["ccc", "mse"]), default="ccc", show_default=True)
@click.option("--batch", default=64, show_default=True, help="Frames of a batch, over all GPUs.")
@click.option("--epochs", default=10, show_default=True)
@click.option("--lr", type=float, help="Learning rate of the head.  [default: 1e-4; from scratch 2e-3]")
@click.option(
    "--layer-decay", type=float,
    help="Each block's share of the rate of the one above.  [default: 0.75; from scratch 1]",
)  # fmt: skip
@click.option("--weight-decay", default=0.05, show_default=True)
@click.option("--ema", type=float, help="Keep a moving average of the weights, as 0.999.")
@click.option("--patience", type=int, help="Stop after so many epochs without a better validation CCC.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
    help="What to compute in.  [default: bfloat16 on a GPU, else float32]",
)  # fmt: skip
@click.option(
    "--checkpointing", is_flag=True, help="Compute activations again instead of keeping them: less memory."
)
@click.option("--seed", default=0, show_default=True)
@click.option("--note", help="A warning that travels with the weights, shown wherever they are used.")
def finetune(data: Path, out: Path, store: str, **how: Any) -> None:
    """Tune the upper blocks of a ViT on the labelled frames of DATA; use the result with -o mae.weights=OUT.

    Stopped, the same command goes on. Several GPUs: torchrun --nproc-per-node 4 --no-python vacli finetune ...
    """
    from .extract.datasets import find
    from .extract.finetune import finetune as run
    from .store import Store

    figures = run(find(data), Store(store, create=True), out, **how)
    if os.environ.get("RANK", "0") == "0":  # one of the processes of torchrun speaks
        click.echo(
            f"{out}: frame by frame, validation CCC V {figures['ccc_valence']:.3f} A {figures['ccc_arousal']:.3f}; "
            f"use it with -o mae.weights={out}"
        )


@click.command()
@JSON
def encoders(as_json: bool) -> None:
    """List the encoders: what they eat and give, where their weights come from and under which licence."""
    from .extract import ENCODERS
    from .extract.catalogue import facts_of, listing

    print_json([facts_of(name) for name in ENCODERS]) if as_json else click.echo(listing())


# ---- shared with predict


def by_name(options: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """-o mae.weights=FILE ... as {"mae": {"weights": "FILE"}}."""
    found: dict[str, dict[str, str]] = {}
    for text in options:
        key, value = pair(text, "-o")
        name, dot, option = key.rpartition(".")
        if not dot:
            raise VacliError(f"-o {text}: wanted NAME.KEY=VALUE, as mae.weights=FILE")
        found.setdefault(name, {})[option] = value
    return found


def of_person(samples: list[Sample], person: str) -> list[Sample]:
    """The samples with the person asked for; one whose id says whom it means (Aff-Wild2's 12_left) keeps its own.

    The left and the right one have ids of their own, as in Aff-Wild2: neither takes the other's place.
    """
    from .extract.people import Person
    from .extract.plan import EVERYBODY
    from .store.names import plain_id

    if person != EVERYBODY:
        Person(person)  # is there such a one
    aside = person not in (EVERYBODY, "main")

    def asked(s: Sample) -> Sample:
        if s.crops or s.person != "main":
            return s
        if aside:
            return replace(s, person=person, id=plain_id(f"{s.id}_{person}"), among=s.id)
        return replace(s, person=person)

    return [asked(s) for s in samples]


@contextlib.contextmanager
def told_when_stopped(samples: list[Sample], store: str) -> Iterator[list[Outcome]]:
    """A list for the outcomes; where the run is stopped, it is told which videos are whole and which are not."""
    outcomes: list[Outcome] = []
    try:
        yield outcomes
    except (KeyboardInterrupt, VacliError):
        whole = {o.sample.id for o in outcomes if o.complete}
        if any(s.person == "all" for s in samples):
            click.echo(f"\n{len(whole)} people are whole in {store}", err=True)
            raise
        left = [s.id for s in samples if s.id not in whole]
        more = f" and {len(left) - 20} more" if len(left) > 20 else ""
        click.echo(
            f"\n{len(whole)} of {len(samples)} videos are whole in {store}; not done: {', '.join(left[:20])}{more}",
            err=True,
        )
        raise


def say_notes(encoders: dict[str, Encoder]) -> None:
    """Licences and warnings of weights, told where a user meets them."""
    for name, encoder in encoders.items():
        for note in (getattr(encoder, "licence", None), getattr(encoder, "note", None)):
            if note:
                say(f"note: {name}: {note}", err=True)


def summarise(outcomes: list[Outcome], store: str, tell: Callable[[str], object] = say) -> None:
    """What was computed, what was there, what went wrong; exit code 1 if anything asked for could not be had."""
    computed = sum(len(o.computed) for o in outcomes)
    there = sum(len(o.tracks) for o in outcomes if o.complete) - sum(
        len(o.computed) for o in outcomes if o.complete
    )
    done = f"computed {computed} tracks" if computed else "nothing to compute"
    tell(f"{done}; {there} tracks of {len(outcomes)} videos were in {store} already")
    for warning, count in _grouped(outcomes).items():
        click.echo(
            printable(f"warning: {warning}{f' (and {count - 1} more)' if count > 1 else ''}"), err=True
        )
    problems = [o for o in outcomes if o.problem]
    if problems:
        click.echo(f"{len(problems)} of {len(outcomes)} videos had a problem:", err=True)
        width = min(40, max(len(o.sample.id) for o in problems))
        for outcome in problems:
            click.echo(f"  {outcome.sample.id:<{width}}  {printable(str(outcome.problem))}", err=True)
        sys.exit(1)


def _grouped(outcomes: list[Outcome]) -> dict[str, int]:
    """The warnings, and how many videos have each: of those that say the same the first is named, from four on."""
    said: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.warning:
            said.setdefault(outcome.warning.removeprefix(f"{outcome.sample.source}: "), []).append(outcome)
    return {
        str(o.warning): count
        for those in said.values()
        for o, count in ([(those[0], len(those))] if len(those) > 3 else [(o, 1) for o in those])
    }
