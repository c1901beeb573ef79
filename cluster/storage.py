"""Files of a run or a corpus, wherever they lie: local paths and any fsspec URL.

Every write is atomic: locally under a temporary name and then renamed, on an object store by its own put. So
a file either exists whole or not at all, and a directory is complete when its record, written last, exists.
"""

import hashlib
import io
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np


def join(url: str, *parts: str) -> str:
    """Joins path parts to a URL or local path."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def absolute(url: str) -> str:
    """The same place for a process that was started elsewhere: local paths from the root, URLs as they are."""
    return url if "://" in url else os.path.abspath(url)


def exists(url: str) -> bool:
    """Whether a file or directory is there."""
    fs, path = fsspec.core.url_to_fs(url)
    return bool(fs.exists(path))


def list_names(url: str) -> list[str]:
    """Sorted names directly inside a directory; empty where it does not exist."""
    fs, path = fsspec.core.url_to_fs(url)
    if not fs.exists(path):
        return []
    return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False))


def read_bytes(url: str) -> bytes:
    """Reads a whole file.

    Raises:
        FileNotFoundError: if it is not there.
    """
    fs, path = fsspec.core.url_to_fs(url)
    return bytes(fs.cat_file(path))


def write_bytes(url: str, data: bytes) -> None:
    """Writes a whole file atomically, making its directory where needed."""
    fs, path = fsspec.core.url_to_fs(url)
    if not _is_local(fs):
        fs.pipe_file(path, data)
        return
    with _written(Path(path), data) as temporary:
        os.replace(temporary, path)


def create_bytes(url: str, data: bytes) -> bool:
    """Writes a whole file atomically if there is none of that name; returns whether it did.

    Of several that try at once, one succeeds: by a hard link locally, by a conditional put on an object store.
    """
    fs, path = fsspec.core.url_to_fs(url)
    try:
        if not _is_local(fs):
            fs.pipe_file(path, data, mode="create")
        else:
            with _written(Path(path), data) as temporary:
                os.link(temporary, path)
    except FileExistsError:
        return False
    return True


def _is_local(fs: Any) -> bool:
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


@contextmanager
def _written(target: Path, data: bytes) -> Iterator[Path]:
    """A temporary file beside the target that holds the data while inside."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def remove(url: str) -> None:
    """Removes a file or a whole directory; nothing happens where there is none."""
    fs, path = fsspec.core.url_to_fs(url)
    if fs.exists(path):
        fs.rm(path, recursive=True)


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
    write_bytes(url, (json.dumps(value, indent=1) + "\n").encode())


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
            return {name: file[name] for name in file.files}
    except Exception as error:  # numpy and zipfile raise many types on damaged input
        raise ValueError(f"{url}: not a readable npz file ({type(error).__name__}: {error})") from error


def sha256(data: bytes) -> str:
    """Hex digest of the bytes."""
    return hashlib.sha256(data).hexdigest()
