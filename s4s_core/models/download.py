"""Download files from the web: once, into one folder, verified, resumed after an interruption."""

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.error import HTTPError
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
    getproxies,
)

from ..errors import UsageError, folder_from, progress, require_file, write_atomically

CHUNK = 1 << 20  # bytes
TIMEOUT = 30  # seconds without a byte
LARGEST = 1 << 36  # bytes, of a body that does not end
OVERLAP = 1 << 16  # bytes that are asked for again, and compared, where a download continues


def home() -> Path:
    """Return the folder of downloaded files: $S4S_HOME, or s4s in the user's cache folder."""
    if folder := folder_from("S4S_HOME"):
        return folder
    if sys.platform == "win32":
        caches = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        caches = Path.home() / "Library" / "Caches"
    else:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "s4s"


def fetch(url: str, sha256: str = "", name: str | None = None) -> Path:
    """Download an http(s) URL to home() / name and return that path.

    `name` is by default the last part of the URL. A file that is already there, downloaded or put
    there by hand, is used without the network. With `sha256` the file is refused unless it has that
    hash. Without it, whatever the server sends is used if the server also says how long it is (as
    a length, or in chunks), and the caller should record its `file_sha256`: a file that the server
    exchanged during an interruption goes unnoticed if its date, its tag, its length and the last
    64 kB that had come are the same. Raises UsageError, which says where to put the file by hand,
    if the download fails or the hash is wrong. A partial download is kept, and the next call
    continues it.
    """
    name = name or url.rpartition("/")[2].partition("?")[0]
    if not url.startswith(("https://", "http://")) or name in ("", "..") or Path(name).name != name:
        raise UsageError(
            f"cannot fetch {url!r} as {name!r}: give an address that begins with https:// or "
            "http:// and ends in a file name"
        )
    path = home() / name
    if not os.path.isfile(path):
        try:
            _download(url, sha256, path)
        except (OSError, HTTPException, ValueError) as error:
            if isinstance(error, HTTPError):
                error.close()
            reason = " ".join(str(error).split())[:100] or type(error).__name__
            raise UsageError(
                f"{url} could not be downloaded ({reason}): try again, or put the file there by "
                f"hand, as {path} (sha256: {sha256 or 'not published'})"
            ) from None
    if sha256 and (found := file_sha256(path)) != sha256:
        raise UsageError(
            f"{path} is not the file of {url}: its sha256 is {found} instead of {sha256}; delete "
            "it to have it downloaded, or put the right file in its place"
        )
    return path


def file_sha256(path: str | Path) -> str:
    """Return the sha256 of a file, in hexadecimal digits.

    The hash is cached in a file beside it, and made again if the file's size or modification time
    has changed.
    """
    require_file(path)
    path = Path(path)
    stat, note = path.stat(), _beside(path, "sha256")
    state = f"{stat.st_size} {stat.st_mtime_ns} "
    with contextlib.suppress(OSError, UnicodeError):
        if (text := note.read_text("utf-8")).startswith(state):
            return text.removeprefix(state)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        _copy(file, [digest.update], f"checking {path.name}", stat.st_size)
    with contextlib.suppress(OSError):  # a folder that others fill may be read-only
        write_atomically(note, f"{state}{digest.hexdigest()}".encode())
    return digest.hexdigest()


def _download(url: str, sha256: str, path: Path) -> None:
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    part, tag = _beside(path, "part"), _beside(path, "tag")
    with FileLock(_beside(path, "lock")):
        if path.is_file():  # another process was faster
            return
        response, start = _open(url, part, tag)
        with response, open(part, "r+b" if start else "w+b") as file:
            if not start:
                tag.write_text(_version(response), "utf-8")
            file.truncate(start)
            digest = hashlib.sha256()
            total = None if response.length is None else start + response.length
            if not sha256 and total is None and not response.chunked:
                raise OSError("the server does not say how long it is, and no sha256 is known")

            def write(chunk: bytes) -> None:
                if file.tell() + len(chunk) > LARGEST:
                    file.truncate(0)
                    raise OSError(f"it has more than {LARGEST} bytes")
                file.write(chunk)

            _copy(file, [digest.update], f"continuing {path.name}", start)
            _copy(response, [digest.update, write], path.name, total, start)
            if total is not None and file.tell() != total:
                raise OSError(f"the connection closed after {file.tell()} of {total} bytes")
            file.flush()
            os.fsync(file.fileno())
        tag.unlink(missing_ok=True)
        if sha256 and digest.hexdigest() != sha256:
            part.unlink()
            raise OSError(f"its sha256 is {digest.hexdigest()} instead of {sha256}")
        os.replace(part, path)


def _open(url: str, part: Path, tag: Path) -> tuple[HTTPResponse, int]:
    """The response and the byte at which it begins.

    It continues the partial file `part` if the server's file still has the version in `tag`, and
    the same bytes where the two overlap. Otherwise it begins at 0.
    """
    headers = {"User-Agent": "s4s-notebooks"}
    version = tag.read_text("utf-8") if part.exists() and tag.exists() else ""
    validator = next(filter(None, version.split("\n")[:2]), "")
    # Some bytes are asked for again, so that no range begins past the end.
    if validator and (size := part.stat().st_size) > 1:
        start = max(1, size - OVERLAP)
        ranged = headers | {"Range": f"bytes={start}-", "If-Range": validator}
        try:
            response = urlopen(Request(url, headers=ranged), timeout=TIMEOUT)
        except HTTPError as error:
            if error.code != 416:  # range not satisfiable: the file has changed
                raise
            error.close()
        else:
            if response.status == 200:
                return response, 0
            begins = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            if response.status == 206 and begins and _version(response) == version:
                with open(part, "rb") as file:
                    file.seek(start)
                    if response.read(size - start) == file.read():
                        return response, size
            response.close()
    response = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    if response.status != 200:
        response.close()
        raise OSError(f"the server answers with {response.status} {response.reason}")
    return response, 0


def urlopen(request: Request, timeout: float) -> HTTPResponse:
    """Open an http(s) address; redirects to any other kind of address are errors."""
    opener = OpenerDirector()
    web = {kind: proxy for kind, proxy in getproxies().items() if kind in ("http", "https")}
    for handler in (
        ProxyHandler(web), HTTPHandler(), HTTPSHandler(), HTTPRedirectHandler(),
        HTTPErrorProcessor(), HTTPDefaultErrorHandler(), UnknownHandler(),
    ):  # fmt: skip
        opener.add_handler(handler)
    return cast(HTTPResponse, opener.open(request, timeout=timeout))


def _version(response: HTTPResponse) -> str:
    """What identifies the version of the server's file: its tag, its date and its length.

    The lines of the first two (RFC 9110) are empty where the server names none.
    """
    length = response.headers.get("Content-Length", "")
    if response.status == 206:
        length = response.headers.get("Content-Range", "").rpartition("/")[2]
    return "\n".join([*(response.headers.get(k, "") for k in ("ETag", "Last-Modified")), length])


def _copy(
    source: BinaryIO,
    sinks: Sequence[Callable[[bytes], object]],
    label: str,
    total: int | None,
    start: int = 0,
) -> None:
    """Read `source` to its end, pass each chunk to all `sinks`, and show a progress bar."""
    options: dict[str, Any] = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
    with progress(desc=label, total=total, initial=start, **options) as bar:
        while chunk := source.read(CHUNK):
            for sink in sinks:
                sink(chunk)
            bar.update(len(chunk))


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")
