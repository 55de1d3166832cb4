"""Where results are kept: files named by a hash of everything that they depend on.

A file is believed if it holds the configuration that is asked for and a hash of its own contents.
Any other is made again, and one line says so.
"""

import ast
import contextlib
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
from torch import Tensor

from ..errors import TEMPORARY, UsageError, folder_from, write_atomically, writing
from ..params import PACKAGE
from ..setup import Setup

Made = TypeVar("Made")


def results_folder() -> Path:
    """Return where results are kept: $S4S_RESULTS, or `results/` in the checkout or folder."""
    root = PACKAGE.parent
    default = root if (root / "params").is_dir() else Path.cwd()
    return folder_from("S4S_RESULTS") or default / "results"


# What a result is computed by; pictures, tables, downloads and notebooks do not change a number.
_METHOD = (
    "[a-z]*.py",
    "baselines/*.py",
    "models/mixture.py",
    "models/networks/*.py",
    "models/inception.py",
    "models/zoo.py",
    "experiments/run.py",
)


@cache
def method() -> str:
    """Return a hash of the code that computes results, without its comments and docstrings."""
    digest = hashlib.sha256()
    for path in sorted(p for pattern in _METHOD for p in PACKAGE.glob(pattern)):
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(
                node
            ):
                node.body[:1] = []
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()[:16]


def cached_tensors(
    setup: Setup, kind: str, config: dict[str, Any], make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the tensors that `make` makes, from their file if there is a sound one."""
    config, path = _of_the_setup(setup, kind, config)
    if (content := read_cached(path)) is not None:
        try:
            with safetensors.safe_open(path, "pt") as file:
                told = file.metadata() or {}
            tensors = safetensors.torch.load(content)
            if told.get("config") == _text(config) and told.get("sha256") == _digest(tensors):
                return tensors
            reason = "it holds other numbers than were written"
        except (safetensors.SafetensorError, OSError) as error:
            reason = str(error)
        say_again(path, reason)
    tensors = make()
    metadata = {"config": _text(config), "sha256": _digest(tensors)}
    write_atomically(path, safetensors.torch.save(tensors, metadata))
    return tensors


def tensors_path(setup: Setup, kind: str, config: dict[str, Any]) -> Path:
    """Return the file of `cached_tensors`, there or not."""
    return _of_the_setup(setup, kind, config)[1]


def _of_the_setup(setup: Setup, kind: str, config: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    """The configuration with what the setup adds to it, and its file."""
    config = {
        **config,
        "kind": kind,
        "teacher": setup.teacher.to_dict(),
        "precision": setup.params.precision,
        "model": setup.model,
        "method": method(),
    }
    return config, cache_path(setup.name, kind, config, "safetensors")


def read_cached(path: Path) -> bytes | None:
    """Return the contents of a file, or None if there is none.

    Raises UsageError for what stands in its place and is no file that can be read.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe or a device would never end
            raise OSError(0, "it is no file")
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(
            f"{path} should be a cached result and cannot be read ({error.strerror}): remove it"
        ) from None


def say_again(path: Path, reason: str) -> None:
    """Tell in one line that a cached file is not believed."""
    print(f"{path} is not believed ({reason:.200}): computing it again", file=sys.stderr)


def write_sealed(path: Path, entries: dict[str, Any]) -> None:
    """Write JSON entries with a hash of themselves, which `read_sealed` checks."""
    content = json.dumps({**entries, "sha256": _seal(entries)}, indent=1)
    write_atomically(path, f"{content}\n".encode())


def read_sealed(
    path: Path, config: dict[str, Any], make: Callable[[dict[str, Any]], Made]
) -> Made | None:
    """Return make(entries) of what `write_sealed` wrote, or None if that is not there or unsound.

    The entry "config" must be the configuration that is asked for. An unsound file is deleted.
    """
    if (content := read_cached(path)) is None:
        return None
    try:
        entries = json.loads(content)
        if isinstance(entries, dict) and entries.pop("sha256", None) == _seal(entries):
            if entries["config"] == config:
                return make(entries)
        reason = "it holds other numbers than were written"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error)
    say_again(path, reason)
    path.unlink(missing_ok=True)  # or the next who reads it says the same
    return None


def _seal(entries: dict[str, Any]) -> str:
    return hashlib.sha256(_text(entries).encode()).hexdigest()


def _text(config: Any) -> str:
    return json.dumps(config, sort_keys=True)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def cache_path(dataset: str, kind: str, config: dict[str, Any], suffix: str) -> Path:
    """Return the file that a hash of `config` names.

    Where it is not there yet, its folder is made and tried: before the work, not after hours of
    it. Raises UsageError if it cannot be written.
    """
    digest = hashlib.sha256(_text(config).encode()).hexdigest()[:16]
    path = results_folder() / dataset / f"{kind}_{digest}.{suffix}"
    with writing(path.parent, "set S4S_RESULTS to another folder"):
        if not path.exists():
            try_folder(path.parent)
    return path


def try_folder(folder: Path) -> None:
    """Make a folder, write to it, and delete what killed writers left there; OSError if not."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(4096))
    for path in folder.glob(f".*{TEMPORARY}"):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if time.time() - path.stat().st_mtime > 24 * 3600:  # no writer takes a day
                path.unlink()
