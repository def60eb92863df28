"""The run of stage one as Ray tasks: workers that hold the encoders, on this machine or many, fill one store."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .. import VacliError
from ..store import Store
from .datasets import Sample
from .encoder import Encoder, make_encoders
from .people import People
from .plan import kind_of
from .run import Outcome, extract

_AT_ONCE = 8  # videos a task: a worker fills its batches from so many


def extract_with_ray(
    samples: list[Sample],
    encoders: dict[str, Encoder],
    store: Store,
    people: People,
    workers: int | None = None,
    tell: Callable[[str], object] = lambda _: None,
    outcomes: list[Outcome] | None = None,
) -> list[Outcome]:
    """As `run.extract`, by the workers of a Ray cluster ($RAY_ADDRESS), else by ones started on this machine.

    workers: by default one for each GPU of the cluster, or for every four CPUs where there is none. Videos, weights and
    store are read and written by the workers, so on several machines they must lie where all of them see them.
    Raises VacliError where ray is not installed, and what is fatal to a worker.
    """
    ray = _ray()
    outcomes = [] if outcomes is None else outcomes
    kinds = {name: (kind_of(e), _given(e)) for name, e in encoders.items()}
    place = str(store) if "://" in str(store) else str(Path(str(store)).absolute())
    modules = os.pathsep.join(
        p for p in (str(Path.cwd()), *sys.path) if p
    )  # where encoders of one's own may lie
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # vacli reports nothing to anybody; Ray would
    ray.init(
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        runtime_env={"env_vars": {"PYTHONPATH": modules}},
    )
    try:
        has = ray.cluster_resources()
        gpus, cpus = int(has.get("GPU", 0)), int(has.get("CPU", 1))
        count = max(1, min(workers or gpus or cpus // 4, len(samples)))
        actor = ray.remote(num_cpus=max(1, cpus // count), num_gpus=min(1, gpus / count))(_Worker)
        pool = ray.util.ActorPool([actor.remote(place, kinds, people) for _ in range(count)])
        size = max(1, min(_AT_ONCE, len(samples) // count))
        tasks = [[_absolute(s) for s in samples[i : i + size]] for i in range(0, len(samples), size)]
        calm = 0.1 if sys.stderr.isatty() else 10.0
        with tqdm(
            total=len(samples), desc="extract", unit="video", dynamic_ncols=True, mininterval=calm
        ) as bar:
            for done, looked_at, fatal in pool.map_unordered(
                lambda worker, task: worker.do.remote(task), tasks
            ):
                outcomes += done
                bar.update(looked_at)
                if fatal:
                    raise _Fatal(fatal)
    except ray.exceptions.RayError as e:
        raise _Fatal(
            f"a worker of Ray was lost ({str(e).splitlines()[0]}); run again: what is stored is kept"
        ) from e
    finally:
        ray.shutdown()
    tell(f"{count} workers of Ray")
    turn = {(s.video or s.crops): n for n, s in enumerate(map(_absolute, samples))}
    outcomes.sort(key=lambda o: (turn[o.sample.video or o.sample.crops], o.sample.id))
    return outcomes


class _Fatal(VacliError):
    fatal = True


class _Worker:
    """One process of the cluster: its encoders are made once, and hold their networks from video to video."""

    def __init__(self, store: str, kinds: dict[str, tuple[str, dict[str, str]]], people: People) -> None:
        self._store, self._people = Store(store, create=True), people
        self._encoders = make_encoders(
            [f"{name}={kind}" for name, (kind, _) in kinds.items()],
            {name: options for name, (_, options) in kinds.items()},
            self._store.fingerprints,
        )

    def do(self, samples: list[Sample]) -> tuple[list[Outcome], int, str | None]:
        """The outcomes, without what could not travel; of how many samples; what was fatal."""
        outcomes: list[Outcome] = []
        try:
            extract(samples, self._encoders, self._store, people=self._people, outcomes=outcomes)
        except VacliError as e:
            return _light(outcomes), len(samples), str(e)
        return _light(outcomes), len(samples), None


def _given(encoder: Encoder) -> dict[str, Any]:
    return {key: value for key, value in encoder.options().items() if value is not None}


def _light(outcomes: list[Outcome]) -> list[Outcome]:
    """Without the encoders themselves."""
    return [
        replace(o, tracks={n: replace(w, kind=replace(w.kind, maker=None)) for n, w in o.tracks.items()})
        for o in outcomes
    ]


def _absolute(sample: Sample) -> Sample:
    """As it is called in another process's folder."""
    video, crops, annotation = (
        path and path.absolute() for path in (sample.video, sample.crops, sample.annotation)
    )
    return replace(sample, video=video, crops=crops, annotation=annotation)


def _ray() -> Any:
    try:
        import ray
        import ray.exceptions
        import ray.util
    except ImportError as e:
        raise VacliError(
            f"--engine ray needs Ray, which cannot be imported ({e}): pip install 'vacli[ray]', or leave it out"
        ) from e
    return ray
