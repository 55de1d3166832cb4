"""Where results are kept: files named by a hash of everything that they depend on."""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from .. import __version__
from ..errors import TEMPORARY, UsageError, write_atomically, writing
from ..params import PACKAGE
from ..setup import Setup


def results_folder() -> Path:
    """Return where results are kept: $S4S_RESULTS, or `results/` in the checkout or folder."""
    root = PACKAGE.parent
    default = root if (root / "params").is_dir() else Path.cwd()
    folder = Path(os.environ.get("S4S_RESULTS") or default / "results")
    try:
        return folder.expanduser()
    except RuntimeError:
        raise UsageError(f"S4S_RESULTS is {folder}, and there is no such user") from None


def cached_tensors(
    setup: Setup, kind: str, config: dict[str, Any], make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the tensors that `make` makes, from their file if it is there and readable."""
    config = {
        **config,
        "kind": kind,
        "teacher": setup.teacher.to_dict(),
        "guidance": setup.params.guidance,
        "precision": setup.params.precision,
        "weights": setup.weights,
        "version": __version__,
    }
    path = cache_path(setup.name, kind, config, "safetensors")
    try:
        return safetensors.torch.load(path.read_bytes())
    except (FileNotFoundError, safetensors.SafetensorError):
        tensors = make()
        write_atomically(path, safetensors.torch.save(tensors))
        return tensors


def cache_path(dataset: str, kind: str, config: dict[str, Any], suffix: str) -> Path:
    """Return the file that a hash of `config` names.

    Where it is not there yet, its folder is made and tried: before the work, not after hours of
    it. Raises UsageError if it cannot be written.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
    path = results_folder() / dataset / f"{kind}_{digest}.{suffix}"
    with writing(path.parent, "set S4S_RESULTS to another folder"):
        if not path.exists():
            _try_folder(path.parent)
    return path


def _try_folder(folder: Path) -> None:
    """Make a folder, write to it, and delete what killed writers left there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(4096))
    for path in folder.glob(f".*{TEMPORARY}"):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if time.time() - path.stat().st_mtime > 24 * 3600:  # no writer takes a day
                path.unlink()
