"""An S3 server in this process (moto) with made-up keys, and a layer over fsspec that counts, stops and interrupts."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

CHANGES = {"pipe_file", "put", "copy", "rm"}
CALLS = {*CHANGES, "find", "ls", "cat_ranges"}


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Its address. The environment names it and its keys as long as it runs; nobody's own keys are looked for."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it tells of every request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        with pytest.MonkeyPatch.context() as patch:
            for key in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
                patch.delenv(key, raising=False)
            for key, value in environment(address).items():
                patch.setenv(key, value)
            yield address
            forget_connections()
    finally:
        server.stop()


def environment(address: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "made-up",
        "AWS_SECRET_ACCESS_KEY": "made-up",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        "AWS_MAX_ATTEMPTS": "1",
    }


def forget_connections() -> None:
    """Close what s3fs keeps open for the whole process; the next one looks at the environment again."""
    import s3fs

    for fs in s3fs.S3FileSystem._cache.values():
        if fs._s3 is not None:
            fs.close_session(fs.loop, fs._s3)
    s3fs.S3FileSystem.clear_instance_cache()


class Killed(BaseException):
    """The process ends here: nothing that would tidy up for an Exception does so."""


class Layer:
    """An fsspec file system, each call of which is noted as (what, paths) and may be stopped.

    before: called with the number of each call; what it raises comes instead of the call.
    half: the number of a call that does the first half of its paths, and kills.
    """

    def __init__(self, fs: Any) -> None:
        self._fs, self.calls = fs, []
        self.before: Callable[[int], None] = lambda n: None
        self.half: int | None = None
        self.knows_create = True

    @classmethod
    def over(cls, store: Any) -> Layer:
        layer = store.at._bucket._fs = cls(store.at._bucket._fs)
        return layer

    def paths(self, what: str) -> list[str]:
        """All paths of the calls of that name."""
        return [p for called, paths in self.calls if called == what for p in paths]

    def __getattr__(self, name: str) -> Any:
        inner = getattr(self._fs, name)
        return self._watched(name, inner) if name in CALLS else inner

    def _watched(self, name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            number = len(self.calls)
            paths = args[-1] if name == "put" else args[0]
            paths = [paths] if isinstance(paths, str) else list(paths)
            self.calls.append((name, paths))
            self.before(number)
            if more.get("mode") == "create" and not self.knows_create:
                raise NotImplementedError("no conditional writing here")
            if self.half == number:
                if len(paths) > 1 and name in CHANGES:
                    inner(*(a[: len(a) // 2] for a in args), **more)
                raise Killed
            return inner(*args, **more)

        return call
