"""Where results are kept: files named by a hash of everything that they depend on."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from .. import __version__
from ..errors import write_atomically
from ..params import PACKAGE
from ..setup import Setup


def results_folder() -> Path:
    """Return where results are kept: $S4S_RESULTS, or `results/` in the checkout or folder."""
    root = PACKAGE.parent
    default = root if (root / "params").is_dir() else Path.cwd()
    return Path(os.environ.get("S4S_RESULTS") or default / "results")


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
    """Return the file that a hash of `config` names."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
    return results_folder() / dataset / f"{kind}_{digest}.{suffix}"
