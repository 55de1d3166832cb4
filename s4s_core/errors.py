"""Errors of one sentence, files written whole, progress bars: what every other module stands on."""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

Made = TypeVar("Made")


class UsageError(ValueError):
    """An error that the user can fix: it says what is wrong, what is allowed and what to do."""

    def _render_traceback_(self) -> list[str]:
        """Return what IPython prints instead of a traceback: the sentence alone."""
        return [f"{type(self).__name__}: {self}"]


def choose(kind: str, name: object, allowed: Collection[str]) -> Any:
    """Return `allowed[name]`, or `name` itself if `allowed` is not a mapping.

    Raises UsageError, which lists the choices of this `kind`, if `name` is not among them.
    """
    if not isinstance(name, str) or name not in allowed:
        raise UsageError(f"unknown {kind} {name!r}; choose one of: {', '.join(sorted(allowed))}")
    return allowed[name] if isinstance(allowed, dict) else name


@contextmanager
def optional_import(packages: str, purpose: str) -> Iterator[None]:
    """Turn an ImportError inside the block into a UsageError that gives the pip command."""
    try:
        yield
    except ImportError:
        raise UsageError(f"{purpose} needs more packages: pip install {packages}") from None


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write `content` beside `path`, then rename: no reader ever meets half a file.

    Several processes may write the same path; the last to finish wins, whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's files are for the owner alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_json(path: str | Path, kind: str, make: Callable[[Any], Made]) -> Made:
    """Return make(contents) of a JSON file, such as a "solver file": data, never executed.

    Raises UsageError, naming the file, if it cannot be read or if `make` refuses its contents.
    """
    try:
        return make(json.loads(Path(path).read_text("utf-8")))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON
        raise UsageError(f"{path} is not a readable {kind} ({error})") from None


def halve_batch(size: int, what: str) -> int:
    """Return half of a batch size that does not fit into memory, with one line of warning.

    Raises UsageError where a single sample does not fit.
    """
    if size <= 1:
        raise UsageError(f"{what}: not even one sample fits into memory; set rematerialize to true")
    half = size // 2
    print(f"{what}: a batch of {size} does not fit into memory, trying {half}", file=sys.stderr)
    return half


def progress(iterable: Iterable | None = None, **options: Any) -> Any:
    """Return a tqdm bar, shown in a terminal or a notebook only, and gone once it is done."""
    from tqdm.auto import tqdm

    return tqdm(iterable, disable=None, leave=False, **options)
