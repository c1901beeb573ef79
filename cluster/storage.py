"""Files of a run or a corpus, wherever they lie: local paths and any fsspec URL.

Every write is atomic: locally under a temporary name and then renamed, on an object store by its own put. So
a file either exists whole or not at all, and a directory is complete when its record, written last, exists.

A remote store may fail for a while: reads and writes are tried again, with growing random pauses, for about a minute;
each such pause is a warning in the log. What it answers for good (not found, not permitted) is an error at once.
"""

import errno
import hashlib
import io
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import numpy as np
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

logger = logging.getLogger(__name__)

ATTEMPTS, FIRST_PAUSE, LONGEST_PAUSE = 6, 1.0, 20.0
"""Tries of an operation on a remote store, and the bounds, in seconds, of the random pauses between them."""

T = TypeVar("T")

LARGEST_ARRAYS = 2**36
"""Bytes that the arrays of one npz may have when unpacked: a guard against decompression bombs."""

FOR_GOOD = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)

LOST_CONNECTION = {
    "botocore.exceptions": {"ConnectionError", "HTTPClientError"},
    "aiohttp.client_exceptions": {"ClientConnectionError", "ClientPayloadError"},
}
"""Errors, by module and name, that are no OSError and mean a lost connection all the same.

By name, since the libraries are there only where their stores are used.
"""


class StoreUnreachableError(ConnectionError):
    """A remote store that gave no answer in all the tries; the message names the place."""


class CredentialsInUrlError(ValueError):
    """A URL with user name and password in it, which would end up in records and logs."""


def join(url: str, *parts: str) -> str:
    """Joins path parts to a URL or local path."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def absolute(url: str) -> str:
    """The same place for a process that was started elsewhere: local paths from the root, URLs as they are."""
    return url if "://" in url else os.path.abspath(url)


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    Raises:
        CredentialsInUrlError: if the URL holds user name or password; the message does not.
    """
    scheme, separator, rest = url.partition("://")
    host, slash, inner = rest.partition("/")
    if separator and "@" in host:
        shown = f"{scheme}://...@{host.rpartition('@')[2]}{slash}{inner}"
        raise CredentialsInUrlError(
            f"{shown}: don't write credentials into a URL, it is recorded and logged; give them as the store's "
            "environment variables (AWS_ACCESS_KEY_ID, ...) or in its configuration file"
        )
    if not separator:  # fsspec takes "::" in a local name for a chain of file systems
        path = os.path.abspath(os.path.expanduser(url))
        return fsspec.filesystem("file"), str(fsspec.core.strip_protocol(f"file://{path}"))
    # Listings that are remembered would hide what other processes write.
    fs, found = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return fs, str(found)


def _is_local(fs: Any) -> bool:
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


def is_local(url: str) -> bool:
    """Whether the place is in this machine's file system."""
    return _is_local(filesystem(url)[0])


def _may_pass(error: BaseException) -> bool:
    """Whether the same operation may succeed a little later."""
    if isinstance(error, FOR_GOOD):
        return False
    kinds = type(error).__mro__
    return isinstance(error, OSError) or any(
        kind.__name__ in LOST_CONNECTION.get(kind.__module__, ()) for kind in kinds
    )


def _patiently(fs: Any, path: str, operation: Callable[[], T]) -> T:
    """What the operation gives; on a remote store it is tried again when it fails for the moment.

    Raises:
        StoreUnreachableError: if it fails so each time.
    """
    if _is_local(fs):
        return operation()

    def warn(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        logger.warning("%s: %s; trying again in %.1f s", path, error, state.upcoming_sleep)

    retrying = Retrying(
        retry=retry_if_exception(_may_pass),
        wait=wait_random_exponential(multiplier=FIRST_PAUSE, max=LONGEST_PAUSE),
        stop=stop_after_attempt(ATTEMPTS),
        before_sleep=warn,
        reraise=True,
    )
    try:
        return retrying(operation)
    except Exception as error:
        if not _may_pass(error):
            raise
        remedy = "check its address and the network, and give the same command again"
        raise StoreUnreachableError(
            f"{path}: the store failed {ATTEMPTS} times, at last so: {error}; {remedy}"
        ) from error


def exists(url: str) -> bool:
    """Whether a file or directory is there."""
    fs, path = filesystem(url)
    return bool(_patiently(fs, path, lambda: fs.exists(path)))


def is_file(url: str) -> bool:
    """Whether a file is there."""
    fs, path = filesystem(url)
    return bool(_patiently(fs, path, lambda: fs.isfile(path)))


def size(url: str) -> int:
    """Bytes of a file.

    Raises:
        FileNotFoundError: if it is not there.
    """
    fs, path = filesystem(url)
    return int(_patiently(fs, path, lambda: fs.size(path)))


def sizes(url: str) -> dict[str, int]:
    """Bytes of the files directly inside a directory, by name, from one listing.

    Empty where it does not exist, or the store does not list.
    """
    fs, path = filesystem(url)
    if _is_local(fs):
        try:
            with os.scandir(path) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except (FileNotFoundError, NotADirectoryError):
            return {}
    fs.invalidate_cache(path)
    try:
        listed = _patiently(fs, path, lambda: fs.ls(path, detail=True))
    except (FileNotFoundError, NotImplementedError):
        return {}
    return {
        str(entry["name"]).rsplit("/", 1)[-1]: int(entry["size"])
        for entry in listed
        if entry.get("type") == "file" and entry.get("size") is not None
    }


def list_names(url: str) -> list[str]:
    """Sorted names directly inside a directory; empty where it does not exist."""
    fs, path = filesystem(url)
    if not exists(url):
        return []
    entries = _patiently(fs, path, lambda: fs.ls(path, detail=False))
    return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries)


def read_bytes(url: str, start: int = 0) -> bytes:
    """Reads a file, whole or from an offset on.

    Raises:
        FileNotFoundError: if it is not there.
    """
    fs, path = filesystem(url)
    return bytes(_patiently(fs, path, lambda: fs.cat_file(path, start=start or None)))


def write_bytes(url: str, data: bytes) -> None:
    """Writes a whole file atomically, making its directory where needed; a pipe or device gets the data."""
    fs, path = filesystem(url)
    if not _is_local(fs):
        _patiently(fs, path, lambda: fs.pipe_file(path, data))
        return
    if Path(path).is_char_device() or Path(path).is_fifo():  # a file renamed onto it would take its place
        Path(path).write_bytes(data)
        return
    with _written(Path(path), data) as temporary:
        os.replace(temporary, path)


def create_bytes(url: str, data: bytes) -> bool:
    """Writes a whole file atomically if there is none of that name; returns whether it did.

    Of several that try at once, one succeeds: by a hard link locally, by a conditional put on an object store.
    """
    fs, path = filesystem(url)
    try:
        if not _is_local(fs):
            fs.pipe_file(path, data, mode="create")
        else:
            with _written(Path(path), data) as temporary:
                os.link(temporary, path)
    except FileExistsError:
        return False
    return True


@contextmanager
def _written(target: Path, data: bytes) -> Iterator[Path]:
    """A temporary file beside the target that holds the data while inside."""
    _make(target.parent)
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")  # the target's own name may be as long as names can be
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if error.errno in (errno.EEXIST, None):
                raise
            raise OSError(error.errno, error.strerror, str(target)) from error  # not the temporary file's name
        needed = f"{target}: no room for its {len(data) / 1e6:.1f} MB ({error.strerror})"
        raise OSError(error.errno, f"{needed}; free some and give the same command again") from error
    finally:
        temporary.unlink(missing_ok=True)


def _make(folder: Path) -> None:
    """Makes a local directory, and those above it, where they are not there.

    Raises:
        OSError: if that is not possible; never of the kinds that mean that a file is there already, or is missing.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, "no directory, or a link to nothing", str(folder)) from error
    except FileNotFoundError as error:  # as in /proc
        raise OSError(errno.EROFS, "no directory can be made there", str(folder)) from error


def remove(url: str) -> None:
    """Removes a file or a whole directory; nothing happens where there is none."""
    fs, path = filesystem(url)
    if exists(url):
        _patiently(fs, path, lambda: fs.rm(path, recursive=True))


def move(url: str, to: str) -> None:
    """Moves a file to another place in the same store, in place of a file that is there; locally atomic."""
    fs, path = filesystem(url)
    target = filesystem(to)[1]
    if _is_local(fs):
        _make(Path(target).parent)
        os.replace(path, target)
        return
    # Not `mv`, of which a second try would find the source gone.
    _patiently(fs, path, lambda: fs.cp_file(path, target))
    _patiently(fs, path, lambda: fs.rm_file(path))


def read_json(url: str) -> Any:
    """Reads a JSON file.

    Raises:
        ValueError: if it is not JSON; the message names the file.
    """
    try:
        return json.loads(read_bytes(url))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        remedy = "remove it and run the same command again"
        raise ValueError(f"{url}: not a JSON file ({error}); {remedy}") from error


def write_json(url: str, value: Any) -> None:
    """Writes a JSON file atomically."""
    write_bytes(url, as_json(value))


def as_json(value: Any) -> bytes:
    """The content of a JSON file."""
    return (json.dumps(value, indent=1) + "\n").encode()


def save_npz(url: str, **arrays: np.ndarray) -> None:
    """Writes named arrays atomically, uncompressed."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_bytes(url, buffer.getvalue())


def load_npz(url: str) -> dict[str, np.ndarray]:
    """Reads named arrays; object arrays (pickles) are refused.

    Raises:
        ValueError: if the file is not a readable npz; the message names it.
    """
    data = read_bytes(url)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            unpacked = sum(entry.file_size for entry in file.zip.infolist())
            if unpacked > LARGEST_ARRAYS:
                raise ValueError(f"{unpacked} bytes when unpacked; at most {LARGEST_ARRAYS} are permitted")
            arrays = {name: file[name] for name in file.files}
            if other := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
                raise ValueError(f"{', '.join(other)}: not an array")
            return arrays
    except Exception as error:  # numpy and zipfile raise many types on damaged input
        raise ValueError(f"{url}: not a readable npz file ({type(error).__name__}: {error})") from error


def sha256(data: bytes) -> str:
    """Hex digest of the bytes."""
    return hashlib.sha256(data).hexdigest()
