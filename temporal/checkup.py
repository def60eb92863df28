"""What stage two finds on this machine: torch, its GPUs, and by what the selective scan is computed."""

from __future__ import annotations

import contextlib
import importlib.util
from importlib import metadata
from typing import Any


def torch_here() -> dict[str, Any]:
    """torch's version, the CUDA it was built for, and each GPU with its memory (bytes).

    Imports torch (2 s).
    """
    import torch

    gpus = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(i)
        free, _ = torch.cuda.mem_get_info(i)
        gpus.append({"name": about.name, "memory_bytes": about.total_memory, "free_bytes": free})
    return {"version": torch.__version__, "built_for_cuda": torch.version.cuda, "gpus": gpus}


def scan_here() -> dict[str, Any]:
    """What computes the scan of Mamba, and the version of what could, None where it is absent; nothing is imported."""
    return {
        "backend": "plain torch, in chunks of rows",
        "mamba_ssm": _version("mamba_ssm", "mamba-ssm"),
        "triton": _version("triton", "triton"),
    }


def _version(module: str, package: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return "of unknown version"
