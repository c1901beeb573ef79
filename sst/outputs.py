"""What a verb writes into a directory that may hold other people's files: all of it or nothing, and nothing of theirs.

A record in the directory names the files of a verb. Only what an earlier record of the same verb names is ever
replaced or removed, and only when the new files are complete.
"""

import glob
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster import storage
from sst.errors import UserError


def record_name(verb: str) -> str:
    """Name of the file that names what the verb wrote beside it."""
    return f".landmarks-{verb}.json"


def staging_name(verb: str) -> str:
    """Name of the folder in which new files wait until they are complete; the verb's own, so it may be cleared."""
    return f".landmarks-{verb}"


def recorded(url: str, verb: str) -> frozenset[str] | None:
    """Files in the directory that the verb wrote, as its record names them; None without a usable record."""
    try:
        content: Any = storage.read_json(storage.join(url, record_name(verb)))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    names = content.get("files") if isinstance(content, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) and _is_inside(name) for name in names):
        return None
    return frozenset(names)


def _is_inside(name: str) -> bool:
    """Whether a recorded name stays in its directory: a record may come from anybody."""
    return bool(name) and not name.startswith("/") and ".." not in name.split("/")


def write_record(url: str, verb: str, names: Iterable[str]) -> None:
    """Notes which files in the directory are the verb's."""
    storage.write_json(storage.join(url, record_name(verb)), {"verb": verb, "files": sorted(names)})


def refuse_overlap(out: str, inputs: Mapping[str, str | None], option: str = "--out") -> None:
    """Refuses an output that is, contains or lies inside an input, links followed.

    Args:
        out: directory or URL that is written to.
        inputs: what each is called, and the file, folder, pattern or URL; None is passed over.
        option: by which the output was given.

    Raises:
        UserError: naming both.
    """
    target = _place(out)
    for what, given in inputs.items():
        for each in [] if given is None else _expanded(given):
            source = _place(each)
            how = "is" if target == source else "contains" if _holds(target, source) else ""
            if not how and _holds(source, target):
                how = "lies inside"
            if how:
                raise UserError(
                    f"{out}: {option} {how} {what} {given}; give a folder outside of it, so that none of your files "
                    "is taken for a result"
                )


def _expanded(given: str) -> list[str]:
    """The input itself; of a pattern one file for every folder that it finds any in."""
    if "://" in given or os.path.exists(given) or not glob.has_magic(given):
        return [given]
    return list({os.path.dirname(match): match for match in glob.iglob(given, recursive=True)}.values())


def _place(url: str) -> tuple[str, ...]:
    if "://" in url and not url.startswith("file://"):
        return tuple(url.rstrip("/").split("/"))
    return Path(os.path.realpath(url.removeprefix("file://"))).parts


def _holds(outer: tuple[str, ...], inner: tuple[str, ...]) -> bool:
    return len(outer) < len(inner) and inner[: len(outer)] == outer


class NewDirectory:
    """Removes a directory again that is made meanwhile, and those above it, where they stay empty."""

    def __init__(self, url: str) -> None:
        """Notes what is there now."""
        path = Path(url)
        self._made = [] if "://" in url else [each for each in (path, *path.parents) if not os.path.lexists(each)]

    def take_back(self) -> None:
        """Removes what was not there before and is empty."""
        for path in self._made:
            with suppress(OSError):
                path.rmdir()


class Outputs:
    """The files that a verb writes into a directory, as a context manager.

    They wait in a folder of their own and are moved to their places on leaving; after an exception they are removed.
    """

    def __init__(self, url: str, verb: str, overwrite: bool, known: Sequence[str]) -> None:
        """Looks whether the place is free.

        Args:
            url: directory or URL.
            verb: whose files they are.
            overwrite: whether those of an earlier run of the verb may be replaced.
            known: names, of files and folders, that the verb may write.

        Raises:
            UserError: if there are such files, from elsewhere or not to be replaced.
        """
        if storage.is_file(url):
            raise UserError(f"{url}: a file; --out must be a directory or URL")
        found = recorded(url, verb)
        self.url, self.verb, self._earlier = url, verb, found or frozenset()
        for name in known:
            mine = any(each == name or each.startswith(f"{name}/") for each in self._earlier)
            if not mine and storage.exists(storage.join(url, name)):
                raise self._foreign(name)
            if mine and not overwrite:
                raise UserError(f"{url}: holds {name} already; choose another --out, or replace it by --overwrite")
        self._new: list[str] = []
        self._staging = storage.join(url, staging_name(verb))
        self._directory = NewDirectory(url)

    def _foreign(self, name: str) -> UserError:
        return UserError(
            f"{self.url}: {name} is there already, and not from `landmarks {self.verb}` (no record names it), so it is "
            "not touched; choose another --out"
        )

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, for now beside its place.

        Raises:
            UserError: if a file of that name is there that no earlier run of the verb wrote.
        """
        if name not in self._earlier and storage.exists(storage.join(self.url, name)):
            raise self._foreign(name)
        storage.write_bytes(storage.join(self._staging, name), data)
        self._new.append(name)

    def __enter__(self) -> Self:
        storage.remove(self._staging)  # of a run that was killed
        try:
            storage.write_bytes(storage.join(self._staging, "begun"), b"")  # what can't be written to is known now
        except BaseException:
            self._clear()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._move()
        finally:
            self._clear()

    def _clear(self) -> None:
        with suppress(OSError):  # the error that is on its way says what is wrong
            storage.remove(self._staging)
        self._directory.take_back()

    def _move(self) -> None:
        write_record(self.url, self.verb, self._earlier.union(self._new))
        for name in self._new:
            storage.move(storage.join(self._staging, name), storage.join(self.url, name))
        for name in self._earlier.difference(self._new):
            storage.remove(storage.join(self.url, name))
            remove_empty(self.url, name)
        write_record(self.url, self.verb, self._new)


def remove_empty(url: str, name: str) -> None:
    """Removes the folders on the way to a file that is gone, where nothing else is in them."""
    if "://" in url:
        return  # an object store has no folders
    for parent in Path(name).parents[:-1]:
        with suppress(OSError):
            Path(url, parent).rmdir()
