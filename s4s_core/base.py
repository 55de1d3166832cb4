"""What every other module stands on: errors told in one sentence, and files written whole."""

import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path


class UsageError(ValueError):
    """A slip that the user can mend: the sentence names it, what is allowed and what to do."""

    def _render_traceback_(self) -> list[str]:
        """What IPython prints instead of a traceback: the sentence alone."""
        return [f"{type(self).__name__}: {self}"]


def one_of(kind: str, name, allowed):
    """`allowed[name]` (or `name`, where `allowed` is no mapping); UsageError if it is not there."""
    if not isinstance(name, str) or name not in allowed:
        raise UsageError(f"unknown {kind} {name!r}; choose one of: {', '.join(sorted(allowed))}")
    return allowed[name] if isinstance(allowed, dict) else name


@contextmanager
def needing(packages: str, purpose: str):
    """Around the imports of packages that not everybody has: UsageError says how to have them."""
    try:
        yield
    except ImportError:
        raise UsageError(f"{purpose} needs more packages: pip install {packages}") from None


def write_atomically(path, content: bytes) -> None:
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


def halved(size: int, what: str) -> int:
    """Half of a batch size that does not fit into memory, with one line of warning.

    Raises UsageError where a single sample does not fit.
    """
    if size <= 1:
        raise UsageError(f"{what}: not even one sample fits into memory; set rematerialize to true")
    half = size // 2
    print(f"{what}: a batch of {size} does not fit into memory, trying {half}", file=sys.stderr)
    return half


def progress(iterable=None, **options):
    """A tqdm bar in a terminal or a notebook, nothing elsewhere; gone once it is done."""
    from tqdm.auto import tqdm

    return tqdm(iterable, disable=None, leave=False, **options)
