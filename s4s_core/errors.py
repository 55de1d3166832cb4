"""Errors of one sentence, files written whole, progress bars: what every other module stands on."""

import json
import os
import reprlib
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


_short = reprlib.Repr()  # never walks through more of a value than it shows
_short.maxlevel = 3
_short.maxlist = _short.maxtuple = _short.maxdict = 12
_short.maxstring = _short.maxother = _short.maxlong = 60


def shown(value: object) -> str:
    """Return a value as an error names it: its repr, in one line of at most 200 characters."""
    try:
        text = " ".join(_short.repr(value).split())
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:197]}..."


def require_whole(name: str, value: object, at_least: int) -> None:
    """Raise UsageError unless `value` is an int, and no bool, of at least this size."""
    if type(value) is not int or value < at_least:
        raise UsageError(
            f"{name} must be a whole number of at least {at_least}, not {shown(value)}"
        )


def choose(kind: str, name: object, allowed: Collection[str]) -> Any:
    """Return `allowed[name]`, or `name` itself if `allowed` is not a mapping.

    Raises UsageError, which lists the choices of this `kind`, if `name` is not among them.
    """
    if not isinstance(name, str) or name not in allowed:
        choices = ", ".join(sorted(allowed))
        raise UsageError(f"unknown {kind} {shown(name)}; choose one of: {choices}")
    return allowed[name] if isinstance(allowed, dict) else name


@contextmanager
def optional_import(packages: str, purpose: str) -> Iterator[None]:
    """Turn an ImportError inside the block into a UsageError that gives the pip command."""
    try:
        yield
    except ImportError:
        raise UsageError(f"{purpose} needs more packages: pip install {packages}") from None


def read_file(path: str | Path, at_most: int) -> bytes:
    """Return the content of a file of at most so many bytes.

    Raises UsageError for one that is larger or cannot be read, and for what is no file: a folder,
    or a pipe or a device, which never end.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is no file")
        with path.open("rb") as file:
            content = file.read(at_most + 1)
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror})") from None
    if len(content) > at_most:
        raise UsageError(f"{path} has more than {at_most:,} bytes, which is too large to be right")
    return content


TEMPORARY = ".tmp"  # what the names of half-written files end in; they begin with a dot


class CannotWriteError(UsageError, OSError):
    """A file or folder that the system does not let be written, and why."""


@contextmanager
def writing(path: Path, remedy: str = "choose another place") -> Iterator[None]:
    """Turn an OSError inside the block into a CannotWriteError, which names the path."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise CannotWriteError(f"cannot write {path} ({reason}): make room, or {remedy}") from None


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write `content` beside `path`, then rename: no reader ever meets half a file.

    Several processes may write the same path; the last to finish wins, whole. Raises
    CannotWriteError where the system does not let it.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(TEMPORARY, f".{path.name}.", path.parent)
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
