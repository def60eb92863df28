"""The command `vacli doctor`: what is here, what is missing, how to get it, and what a folder of videos will take."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from .cli_shell import JSON, complete_encoders, print_json, say
from .cli_store import STORE
from .cli_temporal import RUNS

_WIDTH = 12  # of the first column


@click.command()
@click.option("--video", type=click.Path(path_type=Path), help="Videos to estimate time and disk space for.")
@click.option(
    "--encoder", "encoders", multiple=True, shell_complete=complete_encoders,
    help="An encoder to be used. May be repeated.  [default: judged by the newest run; estimated for mae, logmel]",
)  # fmt: skip
@STORE
@RUNS
@JSON
def doctor(video: Path | None, encoders: tuple[str, ...], store: str, runs: str, as_json: bool) -> None:
    """Say what is here, what is missing and how to get it; exit code 1 if anything needed is missing.

    Needed are the encoders named; without --encoder those of the newest run, and where nothing is trained the default
    ones. Weights are looked for on this machine; nothing is downloaded. With --quiet it says only what is wrong.
    """
    from .doctor import examine

    found = examine(video, encoders, store, runs)
    if as_json:
        print_json(found)
    else:
        _tell(found)
    sys.exit(1 if any(found["problems"].values()) else 0)


def _tell(found: dict[str, Any]) -> None:
    """What `examine` found, for people: the verdict, a block of lines for each part, and what is wrong at the end."""
    from . import printable

    parts = [
        [_verdict(found)],
        _machine(found),
        _media(found),
        _weights(found["weights"]),
        _extras(found["extras"]),
        _kept(found),
        *([_videos(found["videos"])] if "videos" in found else []),
        _ready(found),
    ]
    say("\n\n".join("\n".join(map(printable, part)) for part in parts))
    wrong = _wrong(found["problems"])
    if wrong:
        say("")
    for line in wrong:
        click.echo(printable(line))


def _verdict(found: dict[str, Any]) -> str:
    """In one line."""
    count = {kind: len(told) for kind, told in found["problems"].items()}
    if not any(count.values()):
        unready = [command for command, needs in found["needs"].items() if needs and any(needs.values())]
        return (
            f"all well with what is needed; not ready: {', '.join(unready)} (see below)"
            if unready
            else "all well"
        )
    said = (
        _counted(count["missing"], "thing is missing", "things are missing"),
        _counted(count["unreadable"], "cannot be read", "cannot be read"),
        _counted(count["wrong"], "is wrong", "are wrong"),
    )
    return f"{', '.join(filter(None, said))}: see the end"


def _counted(n: int, one: str, more: str) -> str:
    return f"{n} {one if n == 1 else more}" if n else ""


def _wrong(problems: dict[str, list[str]]) -> list[str]:
    """The problems under a heading for each kind."""
    from .doctor import KINDS

    lines = []
    for kind, told in problems.items():
        lines += [f"{KINDS[kind]} ({len(told)}):", *(f"  {line}" for line in told)] if told else []
    return lines


def _ready(found: dict[str, Any]) -> list[str]:
    """What each encoder lacks, for the two commands that want encoders."""
    newest, lines = found["runs"].get("newest"), []
    for command, needs in found["needs"].items():
        if needs is None:
            continue
        lacks = [_row("", f"{name}: {lack['text']}") for name, lack in needs.items() if lack]
        of_run = f"with {newest}, which reads " if command == "predict" else "with "
        lines.append(_row(command, f"{of_run}{', '.join(needs)}: {'not ready' if lacks else 'all is there'}"))
        lines += lacks
    return lines


def _row(name: str, text: Any) -> str:
    return f"{name:<{_WIDTH}}{text}"


def _machine(found: dict[str, Any]) -> list[str]:
    machine, torch, scan = found["machine"], found["torch"], found["scan"]
    if "error" in machine:
        return [_row("machine", machine["error"])]
    memory = f", {_size(machine['memory_bytes'])} of memory" if machine["memory_bytes"] else ""
    gpus = [
        f"{g['name']}, {_size(g['memory_bytes'])} ({_size(g['free_bytes'])} free)"
        for g in torch.get("gpus", [])
    ]
    lines = [
        _row("vacli", f"{found['vacli']} in {machine['installed_in']}"),
        _row("python", f"{machine['python']} ({machine['executable']}) on {machine['system']}"),
        _row("gpu", "; ".join(gpus) or f"none: CPU, {machine['cores']} cores{memory}"),
    ]
    if gpus:
        lines.append(_row("cpu", f"{machine['cores']} cores{memory}"))
    if "error" in torch:
        lines.append(_row("torch", torch["error"]))
    else:
        gains = "gains here" if torch["bfloat16"] else "does not gain here: float32"
        built = torch["built_for_cuda"] or "the CPU"
        lines.append(_row("torch", f"{torch['version']}, built for CUDA {built}; bfloat16 {gains}"))
    if "error" in scan:
        return [*lines, _row("scan", scan["error"])]
    others = ", ".join(f"{k.replace('_', '-')} {scan[k] or 'absent'}" for k in ("mamba_ssm", "triton"))
    return [*lines, _row("scan", f"{scan['backend']} ({others})")]


def _media(found: dict[str, Any]) -> list[str]:
    codecs, faces = found["codecs"], found["faces"]
    lines = [_row("codecs", codecs.get("error") or f"PyAV {codecs['pyav']}")]
    for name, codec in codecs.get("found", {}).items():
        lines.append(_row("", f"{name:<8} {'yes' if codec['here'] else 'no ':<4} {codec['for']}"))
    lines.append(_row("faces", f"mtcnn    {faces['mtcnn'].get('error') or 'yes: its weights load'}"))
    absent = (
        "no   optional: yunet.onnx among the weights (face_detection_yunet_2023mar.onnx, OpenCV's zoo, MIT)"
    )
    yunet = faces["yunet"]
    return [*lines, _row("", f"yunet    {yunet.get('error') or yunet['file'] or absent}")]


def _weights(weights: dict[str, Any]) -> list[str]:
    if "error" in weights:
        return [_row("weights", weights["error"])]
    places = (f"{p} (no such folder)" if p in weights["absent"] else str(p) for p in weights["looked_in"])
    lines = [
        _row("weights", f"looked for in {', '.join(places)}, then in {weights['hub_cache']}"),
        _row("", "$VACLI_WEIGHTS names another folder, -o NAME.weights=FILE any file"),
    ]
    for facts in weights["encoders"]:
        if facts["files"]:
            problem = f" {facts['problem']}" if facts["problem"] else ""
            lines.append(_row("", f"{facts['name']:<9}{facts['here'] or 'not on this machine'}{problem}"))
        else:
            lines.append(_row("", f"{facts['name']:<9}{facts['weights']}"))
        lines.append(_row("", f"{'':<9}licence: {facts['licence']}"))
        if not facts["here"]:
            lines += [_row("", f"{'':<9}file: {' or '.join(facts['files'])}")] if facts["files"] else []
        if not facts["here"] or facts["problem"]:
            lines += [_row("", f"{'':<9}get: {facts['get']}")] if facts["get"] else []
    for file in weights["files"]:
        said = ", ".join(str(v) for k, v in file.items() if k not in ("path", "bytes"))
        lines.append(_row("", f"there is {file['path']}, {_size(file['bytes'])}{': ' if said else ''}{said}"))
    return lines


def _extras(extras: dict[str, Any]) -> list[str]:
    told = {extra: e["version"] or f"no: pip install 'vacli[{extra}]'" for extra, e in extras.items()}
    lines = [f"{extra:<12}{text:<36}{extras[extra]['for']}" for extra, text in told.items()]
    return [_row("" if i else "extras", line) for i, line in enumerate(lines)]


def _kept(found: dict[str, Any]) -> list[str]:
    store, runs, disk = found["store"], found["runs"], found["disk"]
    if "tracks" in store:
        size = _size(store["bytes"])
        about = f"{store['place']}: {store['videos']} videos, {store['tracks']} tracks, {size}"
    else:
        about = store.get("error") or f"{store['place']}: {store['note']}"
    trained = runs.get("error") or (
        f"{runs['folder']}/: {runs['finished']} finished, the newest {runs['newest']}"
        if runs["finished"]
        else f"{runs['folder']}/: none finished yet: vacli train makes one"
    )
    free = disk.get("error") or (
        f"{_size(disk['free_bytes'])} free of {_size(disk['total_bytes'])} ({disk['of']})"
    )
    return [_row("store", about), _row("runs", trained), _row("disk", free)]


def _videos(videos: dict[str, Any]) -> list[str]:
    if "error" in videos:
        return [_row("videos", videos["error"])]
    unknown = f", {videos['unknown']} of unknown length" if videos["unknown"] else ""
    broken = f", {len(videos['problems'])} cannot be read" if videos["problems"] else ""
    about = (
        f"{videos['videos']} videos{broken}{unknown}, {videos['hours']:.2f} hours, {videos['frames']} frames"
    )
    width = max(len(t["name"]) for t in videos["tracks"])
    lines = [
        _row("videos", f"{videos['folder']}: {about}"),
        _row("", f"{'track':<{width}}{'rows':>10}{'dims':>6}{'size':>9}  on this CPU, roughly"),
    ]
    for t in videos["tracks"]:
        if "problem" in t:
            lines.append(_row("", f"{t['name']:<{width}}  {t['problem']}"))
            continue
        size = "?" if t["bytes"] is None else _size(t["bytes"])
        lines.append(
            _row(
                "",
                f"{t['name']:<{width}}{t['rows']:>10}{t['dim'] or '?':>6}{size:>9}  {_time(t['cpu_hours'])}",
            )
        )
    return [*lines, _row("", f"together {_size(videos['bytes'])}; what the store has already is counted too")]


def _time(hours: float | None) -> str:
    if hours is None:
        return "not measured"
    return f"{hours:.1f} hours" if hours >= 2 else f"{max(1, round(60 * hours))} min"


def _size(nbytes: int) -> str:
    from .store.show import size_text

    return size_text(nbytes)
