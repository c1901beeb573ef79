"""What `train own` packed: so that the same command, given later, knows whether pictures or boxes have changed."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from cluster import storage
from sst.corpora.listing import content_of, listed, shown
from sst.corpora.projects import files_of


class FileRecord(BaseModel):
    """A file as it was: bytes, time of the last change in ns, sha256 of the content ("" where it can't be read)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    changed: int
    sha256: str


class OwnData(BaseModel):
    """Pictures by their name in the folder, and the annotation file or files where there are any."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pictures: dict[str, FileRecord]
    annotations: FileRecord | None = None


def look(images: str, names: Sequence[str], annotations: str | None, before: OwnData | None = None) -> OwnData:
    """What is there now.

    Args:
        images: the folder.
        names: of the pictures in it.
        annotations: the annotation file, or the project of an annotation tool.
        before: as it was earlier; files of the same size and time are not read again.
    """
    known = before.pictures if before else {}
    pictures = {shown(name): _record(Path(images, name), known.get(shown(name))) for name in names}
    return OwnData(pictures=pictures, annotations=_together(files_of(annotations)) if annotations else None)


def _together(paths: Sequence[Path]) -> FileRecord:
    """Several files as one."""
    each = [_record(path, None) for path in paths]
    if len(each) == 1:
        return each[0]
    digest = storage.sha256(" ".join(record.sha256 for record in each).encode())
    return FileRecord(size=sum(r.size for r in each), changed=max(r.changed for r in each), sha256=digest)


def _record(path: Path, before: FileRecord | None) -> FileRecord:
    try:
        status = path.stat()
        if before is not None and (before.size, before.changed) == (status.st_size, status.st_mtime_ns):
            return before
        return FileRecord(size=status.st_size, changed=status.st_mtime_ns, sha256=content_of(path).hex())
    except OSError:
        return FileRecord(size=0, changed=0, sha256="")


def changes(before: OwnData, now: OwnData) -> list[str]:
    """What is different now, as a person reads it; a file that was only touched is not."""
    old, new = before.pictures, now.pictures
    found = {
        "new": new.keys() - old.keys(),
        "gone": old.keys() - new.keys(),
        "changed": {name for name in old.keys() & new.keys() if old[name].sha256 != new[name].sha256},
    }
    said = [
        f"{len(names)} picture{'s are' if len(names) > 1 else ' is'} {what} ({listed(sorted(names), 3)})"
        for what, names in found.items()
        if names
    ]
    if (before.annotations and before.annotations.sha256) != (now.annotations and now.annotations.sha256):
        gone = now.annotations is not None and not now.annotations.sha256
        said.append(f"the file of --annotations is {'gone' if gone else 'another one'}")
    return said
