"""Which files of a folder are the pictures that a person means by naming it; what is left out, and why.

Every rule is stated here once, for packing, predicting and training on one's own images alike.
"""

import hashlib
import os
import stat
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from cluster import storage
from sst.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""Endings of pictures, which are not looked into here. Files of other endings are pictures if they begin like one."""

VIDEO_SUFFIXES = tuple(
    ".mp4 .mov .avi .mkv .webm .m4v .wmv .asf .flv .mpg .mpeg .ts .mts .m2ts .vob .3gp .ogv .y4m .mjpeg .mjpg .mj2 "
    ".h264 .h265".split()
)
"""Endings of videos."""

RAW_SUFFIXES = (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".rw2", ".srw")
"""Raw files of cameras: they begin like TIFF files, of which only a thumbnail would be read."""

SYSTEM_NAMES = frozenset(
    ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "#recycle", "$recycle.bin",
     "system volume information", "lost+found")
)  # fmt: skip
"""What operating systems and storage devices put into folders, beside files whose names begin with a dot."""

DRAWN = ("pictures", "named_pictures")
"""Folders of `landmarks predict`, beside its tables."""

HIDDEN, LINKS, UNREADABLE = "system or hidden", "links that lead back or to what is searched anyhow", "can't be read"
OURS, SPECIAL = "made by landmarks or MLflow", "no regular files"
RAW, OTHER = "raw files of cameras, to be converted first", "no pictures"


@dataclass
class Listing:
    """What is in a folder.

    Attributes:
        names: pictures, relative to the folder, sorted.
        left_out: other files and whole folders, by reason; folders end with a slash.
    """

    names: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def say(self) -> None:
        """Prints how much was left out and why, with the first names, on stderr."""
        said = [f"{len(names)} {reason} ({listed(sorted(names), 3)})" for reason, names in self.left_out.items()]
        if said:
            print(f"note: left out: {'; '.join(said)}", file=sys.stderr)


def shown(name: str) -> str:
    r"""The name of a file as text that can be stored and printed: bytes that are no UTF-8 become \xNN."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a character, which no file's name holds but JSON can
        return name.encode("utf-8", "backslashreplace").decode()


def listed(names: Iterable[object], most: int = 5) -> str:
    """The first names of many, each once."""
    each = [shown(str(name)) for name in dict.fromkeys(names)]
    return ", ".join(each[:most]) + (", ..." if len(each) > most else "")


def same_name(name: str) -> str:
    """The name as it is compared: accents may be stored as characters of their own, as macOS does."""
    return unicodedata.normalize("NFC", name)


def pictures_in(folder: str, or_none: bool = False) -> Listing:
    """The pictures in a folder and in all folders in it.

    Left out are: what operating systems put there, and hidden files; runs and predictions of this program, and
    MLflow's artifacts; links back to a folder around them, and folders that are reached a second time; what is no
    picture by its ending or its first bytes; what can't be read.

    Args:
        folder: where to look.
        or_none: accept that there is none.

    Raises:
        UserError: if there is no such folder, or no picture in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{folder}: {'not a folder' if root.exists() else 'no such folder'}; give a folder of images")
    listing = Listing()
    _search(root, listing)
    listing.names.sort()
    if not listing.names and not or_none:
        listing.say()
        raise UserError(f"{folder}: no image in it (looked for {' '.join(IMAGE_SUFFIXES)}, in subfolders too)")
    return listing


def _search(root: Path, listing: Listing) -> None:
    """Real folders before those that links lead to, so that a picture keeps its own name."""
    waiting, linked, seen = [""], list[str](), set[tuple[int, int]]()
    while waiting or linked:
        name = waiting.pop() if waiting else linked.pop(0)
        place = root / name
        try:
            status = place.stat()
            if (key := (status.st_dev, status.st_ino)) in seen or (place.is_symlink() and name and _leads_back(place)):
                listing.left_out[LINKS].append(f"{name}/")
                continue
            seen.add(key)
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError:
            if not name:
                raise
            listing.left_out[UNREADABLE].append(f"{name}/")
            continue
        predicted = {"predictions.json", "predictions.csv"} <= {entry.name for entry in entries}
        for entry in entries:
            path = f"{name}/{entry.name}" if name else entry.name
            if not entry.is_dir():
                sort_in(Path(entry.path), path, listing)
            elif is_hidden(entry.name):
                listing.left_out[HIDDEN].append(f"{path}/")
            elif entry.name in (DRAWN if predicted else ()) or entry.name == "mlruns" or is_run(entry.path):
                listing.left_out[OURS].append(f"{path}/")
            else:
                (linked if entry.is_symlink() else waiting).append(path)


def _leads_back(link: Path) -> bool:
    """Whether a link leads to a folder that it lies in itself."""
    return os.path.realpath(link.parent).startswith(os.path.join(os.path.realpath(link), ""))


def is_video(name: str) -> bool:
    """Whether a file's name is that of a video."""
    return name.lower().endswith(VIDEO_SUFFIXES)


def is_run(folder: str) -> bool:
    """Whether a folder is the directory of a run."""
    for name, keys in (("settings.json", {"settings", "manifest"}), ("own.json", {"given", "settings"})):
        if os.path.isfile(path := os.path.join(folder, name)):
            try:
                content = storage.read_json(path)
            except (OSError, ValueError):
                continue
            if isinstance(content, dict) and keys <= content.keys():
                return True
    return False


def is_hidden(name: str) -> bool:
    """Whether a file or folder is one that people do not see, or do not know of."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def sort_in(path: Path, name: str, listing: Listing) -> None:
    """Puts a file among the pictures or what is left out.

    Args:
        path: where it lies.
        name: what it is called in the listing.
        listing: is added to.
    """
    suffix = path.suffix.lower()
    try:
        if is_hidden(path.name):
            listing.left_out[HIDDEN].append(name)
        elif not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for ever
            listing.left_out[SPECIAL].append(name)
        elif suffix in IMAGE_SUFFIXES or (suffix not in RAW_SUFFIXES and begins_like_picture(path)):
            listing.names.append(name)
        else:
            listing.left_out[RAW if suffix in RAW_SUFFIXES else OTHER].append(name)
    except OSError:
        if suffix in IMAGE_SUFFIXES:  # whoever wants to read it says why it can't be
            listing.names.append(name)
        else:
            listing.left_out[UNREADABLE].append(name)


def begins_like_picture(path: PurePath) -> bool:
    """Whether a file begins as JPEG, PNG, GIF, TIFF, JPEG 2000, WebP, BMP, PPM, AVIF or HEIF files do."""
    with open(path, "rb") as file:
        start = file.read(12)
    return (
        start.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  "))
        or (start[:4] == b"RIFF" and start[8:] == b"WEBP")
        or (start[:2] == b"BM" and start[6:10] == bytes(4))
        or (start[:2] in (b"P5", b"P6") and start[2:3].isspace())
        or (start[4:8] == b"ftyp" and start[8:] in (b"avif", b"avis", b"heic", b"heix", b"mif1"))
    )


def copies(root: Path, names: Sequence[str]) -> dict[str, str]:
    """Files of equal content, be it by a link or as a copy.

    Args:
        root: the folder.
        names: of the files in it.

    Returns:
        By name, the first name of those with the same content; only of files that are not alone.
    """
    by_size: dict[int, list[str]] = defaultdict(list)
    for name in names:
        try:
            by_size[(root / name).stat().st_size].append(name)
        except OSError:
            continue
    found = {}
    for alike in by_size.values():
        by_content: dict[bytes, list[str]] = defaultdict(list)
        for name in alike if len(alike) > 1 else ():
            try:
                by_content[content_of(root / name)].append(name)
            except OSError:
                continue
        for group in by_content.values():
            found.update({name: min(group) for name in group if len(group) > 1})
    return found


def content_of(path: Path) -> bytes:
    """A digest of a file's content.

    Raises:
        OSError: if it can't be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
