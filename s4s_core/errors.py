"""Errors of one sentence, files written whole, progress bars: what every other module stands on."""

import json
import os
import re
import reprlib
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

Made = TypeVar("Made")


class UsageError(ValueError):
    """An error that the user can fix: it says what is wrong, what is allowed and what to do."""

    def __str__(self) -> str:
        """Return the sentence in one line, whatever names, paths or addresses it tells of."""
        line = " ".join(super().__str__().splitlines())
        return re.sub(r"(\S{60})\S{80,}(\S{60})", r"\1...\2", line)

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


def require_whole(name: str, value: object, at_least: int, at_most: int = 10**6) -> None:
    """Raise UsageError unless `value` is an int, and no bool, between these two."""
    if type(value) is not int or not at_least <= value <= at_most:
        raise UsageError(
            f"{name} must be a whole number from {at_least} to {at_most}, not {shown(value)}"
        )


def require(name: str, value: object, *kinds: type) -> None:
    """Raise UsageError unless `value` is of one of these classes."""
    if not isinstance(value, kinds):
        allowed = " or ".join(kind.__name__ for kind in kinds)
        raise UsageError(f"{name} must be a {allowed}, not {shown(value)}")


def choose(kind: str, name: object, allowed: Collection[str]) -> Any:
    """Return `allowed[name]`, or `name` itself if `allowed` is not a mapping.

    Raises UsageError, which lists the choices of this `kind`, or of many the ten with the nearest
    names, if `name` is not among them.
    """
    if not isinstance(name, str) or name not in allowed:
        choices, others = sorted(allowed), ""
        if len(choices) > 30:
            others = f" (and {len(choices) - 10} less like it)"
            choices = get_close_matches(shown(name), choices, 10, 0)
        raise UsageError(
            f"unknown {kind} {shown(name)}; choose one of: {', '.join(choices)}{others}"
        )
    return allowed[name] if isinstance(allowed, dict) else name


@contextmanager
def optional_import(packages: str, purpose: str) -> Iterator[None]:
    """Turn an ImportError inside the block into a UsageError that gives the pip command."""
    try:
        yield
    except ImportError:
        raise UsageError(f"{purpose} needs more packages: pip install {packages}") from None


def require_file(path: str | Path) -> None:
    """Raise UsageError unless `path` is a file: a pipe or a device would never end."""
    if os.path.isdir(path):
        raise UsageError(f"{path} is a folder, no file: name one in it")
    if not os.path.isfile(path):
        raise UsageError(f"there is no file {path}; check the path, or fetch or train it")


def read_file(path: str | Path, at_most: int) -> bytes:
    """Return the content of a file of at most so many bytes; UsageError if there is none."""
    require_file(path)
    try:
        with open(path, "rb") as file:
            content = file.read(at_most + 1)
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror})") from None
    if len(content) > at_most:
        raise UsageError(f"{path} has more than {at_most:,} bytes, which is too large to be right")
    return content


def reason(path: str | Path, error: Exception) -> str:
    """Return why a file cannot be read: what it really is, or else the error's first sentence."""
    with suppress(OSError, UsageError):
        require_file(path)
        with open(path, "rb") as file:
            start = file.read(200).strip().lower()
        if not start:
            return "it is empty"
        if start.startswith(b"version https://git-lfs"):
            return "it is a Git LFS pointer, in whose place git lfs pull puts the file"
        if start.startswith((b"<!doctype", b"<html", b"<?xml")):
            return "it is a web page"
    words = str(error).split() or [type(error).__name__]
    return " ".join(words).split(". ")[0][:200]  # a second sentence may give unsafe advice


def first_line(error: Exception, at_most: int = 200) -> str:
    """Return the first line of an error's message, cut there; its class where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:at_most]


def in_one_line(error: BaseException) -> str:
    """Return the class and the message of an error, without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def folder_from(variable: str) -> Path | None:
    """Return the folder that an environment variable names, or None where it names none.

    Raises UsageError for the home of a user that does not exist.
    """
    if not (named := os.environ.get(variable)):
        return None
    try:
        return Path(named).expanduser().absolute()
    except RuntimeError:
        raise UsageError(f"{variable} is {named}, and there is no such user") from None


TEMPORARY = ".tmp"  # what the names of half-written files end in; they begin with a dot


class CannotWriteError(UsageError, OSError):
    """A file or folder that the system does not let be written, and why."""


@contextmanager
def writing(path: Path, remedy: str = "choose another place") -> Iterator[None]:
    """Turn an OSError inside the block into a CannotWriteError, which names the path."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: no system has such a name
        why = getattr(error, "strerror", None) or error
        raise CannotWriteError(f"cannot write {path} ({why}): make room, or {remedy}") from None


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write `content` beside `path`, then rename: no reader ever meets half a file.

    Several processes may write the same path; the last to finish wins, whole. Raises
    CannotWriteError where the system does not let it, and for a pipe or a device, which the new
    file would replace.
    """
    path = Path(path)
    with writing(path):
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("it is there, and no file")
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

    Raises UsageError, naming the file, if it cannot be read, if it says something twice, or if
    `make` refuses its contents.
    """
    content = read_file(path, LARGEST_JSON)
    try:
        return make(json.loads(content.decode(), object_pairs_hook=_once))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not a readable {kind} ({reason(path, error)})") from None
    except (ValueError, RecursionError):  # not UTF-8, endless digits, endless lists in lists
        raise UsageError(f"{path} is not a readable {kind}: it is no plain JSON") from None


LARGEST_JSON = 2**27  # bytes; tables of each pixel take megabytes


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; UsageError for a name that is there twice."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        twice = max(names, key=names.count)
        raise UsageError(f"{shown(twice)} is here twice")
    return entries


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
