"""The machine an encoder computes on: which device, and which precision gains there."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

from .weights import EncoderError

if TYPE_CHECKING:
    import torch


def choose_device(asked: str | None, who: str = "mae") -> torch.device:
    """The one asked for, else a GPU where there is one. Raises EncoderError for one that torch has not here."""
    import torch

    try:
        return torch.empty(0, device=asked or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError, NotImplementedError) as e:  # unknown, or not on this machine
        raise EncoderError(
            f"{who}.device is {asked!r}, which torch has not here; wanted cpu or cuda: `vacli doctor` says which"
        ) from e


def choose_dtype(asked: str | None, device: str | None, wide: bool, who: str = "mae") -> str:
    """ "float32" or "bfloat16": the latter on a GPU; on a CPU for wide models, as narrow ones lose more to casting.

    torch is asked (2 s to import) only where a look at the machine does not settle it.
    """
    if asked is not None:
        if asked not in ("float32", "bfloat16"):
            raise EncoderError(f"{who}.dtype is {asked!r}; wanted float32 or bfloat16")
        return asked
    if wide and _cpu_has_bfloat16():
        return "bfloat16"  # whichever of the two it will be
    if not wide and (device == "cpu" or (device is None and _no_gpu())):
        return "float32"
    import torch

    on_gpu = choose_device(device, who).type == "cuda"
    return "bfloat16" if on_gpu or (wide and torch.ops.mkldnn._is_mkldnn_bf16_supported()) else "float32"


def _cpu_has_bfloat16() -> bool:
    """Linux lists what oneDNN asks of a CPU for bfloat16, and nobody told oneDNN to use less; False if in doubt."""
    if {"ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"} & os.environ.keys():
        return False
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as f:
        flags: set[str] = next((set(line.split()) for line in f if line.startswith("flags")), set())
        return flags >= {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    return False


def _no_gpu() -> bool:
    """No driver of NVIDIA's, of WSL's or of AMD's; False if in doubt."""
    drivers = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
    return sys.platform == "linux" and not any(map(os.path.exists, drivers))
