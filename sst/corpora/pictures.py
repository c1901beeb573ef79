"""What kind of picture a file is: sides, rotation, number of pictures, bits of its values."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sst.corpora.listing import listed
from sst.data.jpeg import MAX_PIXELS

_ORIENTATION = 0x0112  # the EXIF tag

FULL = 65535
"""The largest value of 16 bits."""

SINGLE_SUFFIXES = (".jpg", ".jpeg", ".bmp")
"""Formats of one picture; what cameras put behind it in a JPEG file are previews of it."""

SHALLOW_SUFFIXES = (*SINGLE_SUFFIXES, ".webp")
"""Formats without 16-bit values: their headers need not be looked at."""


@dataclass(frozen=True)
class Frame:
    """Sides of a picture when upright, and how its EXIF turns or mirrors what is stored (1 to 8, 1 for not at all)."""

    width: int
    height: int
    orientation: int = 1

    @property
    def turned(self) -> bool:
        """Whether width and height of what is stored are exchanged."""
        return self.orientation >= 5

    def upright(self, places: np.ndarray, pixel: float) -> np.ndarray:
        """Places (N, 2) of the picture as stored, where it is `turned`, in the upright picture.

        Args:
            places: x, y.
            pixel: 1 for the middles of pixels, whose mirror image is the middle of another; 0 for edges between them.
        """
        x, y = self.height - pixel - places[:, 0], self.width - pixel - places[:, 1]
        right, down = {5: (places[:, 1], places[:, 0]), 6: (y, places[:, 0]), 7: (y, x), 8: (places[:, 1], x)}[
            self.orientation
        ]
        return np.stack([right, down], axis=1)


def picture_frame(path: Path) -> Frame | None:
    """Sides of a picture by its header, without decoding it; None where that can't be read."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            orientation = file.getexif().get(_ORIENTATION, 1)
            orientation = orientation if orientation in range(1, 9) else 1
            sides = file.size if orientation < 5 else file.size[::-1]
            return Frame(sides[0], sides[1], orientation)
    except Exception:  # Pillow raises many types on damaged input; reading the picture will name what is wrong
        return None


def picture_count(path: Path) -> int | None:
    """Pictures in an image file, more than one in an animation; None if it is no image."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            return int(getattr(file, "n_frames", 1))
    except Exception:  # as above
        return None


def several_note(pictures: Mapping[str, Path]) -> list[str]:
    """What is said of files with more than one picture, by name: a line, or none."""
    files = {name: path for name, path in pictures.items() if path.suffix.lower() not in SINGLE_SUFFIXES}
    several = [name for name, path in files.items() if (picture_count(path) or 1) > 1]
    what = "only the first of several pictures in a file (animations, pages) is used"
    return [f"{what}: {len(several)} ({listed(several, 3)})"] if several else []


def _is_deep(file: Any) -> bool:
    """Whether a file opened by Pillow stores more than 8 bits for each value."""
    if file.mode.startswith("I") or file.format == "JPEG2000":  # which does not say; its values do
        return True
    layouts = [str(tile[3]) for tile in getattr(file, "tile", ())]
    return any(";16" in layout or str(FULL) in layout for layout in layouts)


def _deep_values(file: Any, path: Path) -> np.ndarray | None:
    """Values 0 to 65535, (H, W) or (H, W, 3 or 4), as stored; None for a picture of 8 bits.

    Pillow keeps 16 bits in grey pictures only, so others are read by OpenCV.
    """
    if file.mode.startswith("I"):
        return np.clip(np.asarray(file).astype(np.int64), 0, FULL)
    if not _is_deep(file):
        return None
    import cv2

    values = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16 or values.ndim != 3:
        return None
    order = [2, 1, 0, 3][: values.shape[2]]
    return np.ascontiguousarray(values[:, :, order])


def stretched(file: Any, path: Path, white: int) -> Any:
    """A picture with 8 bits: itself, or what has 16 with `white` and all above it at 255; not yet upright.

    Args:
        file: opened by Pillow.
        path: the same.
        white: which value is white.
    """
    from PIL import Image

    if (values := _deep_values(file, path)) is None:
        return file
    image = Image.fromarray(np.rint(np.minimum(values, white) / (white / 255)).astype(np.uint8))
    image.getexif()[_ORIENTATION] = file.getexif().get(_ORIENTATION, 1)
    return image


def white_level(paths: Iterable[Path]) -> int | None:
    """The value that all 16-bit pictures of a corpus are stretched by: the largest of as many bits as they use.

    Cameras and scanners store 10, 12 or 14 bits in files of 16, which would be nearly black. One value for all keeps
    their brightness comparable. At least 8 bits are taken, as those are not more than a screen shows.

    Returns:
        1023, 4095, ...; None if there is no such picture, or they use all 16 bits.
    """
    from PIL import Image

    most = -1
    for path in paths:
        if path.suffix.lower() in SHALLOW_SUFFIXES:
            continue
        try:
            with Image.open(path) as file:
                if _is_deep(file) and file.width * file.height <= MAX_PIXELS:
                    values = _deep_values(file, path)
                    most = max(
                        most, -1 if values is None else int(values[..., :3].max() if values.ndim > 2 else values.max())
                    )
        except Exception:  # Pillow raises many types on damaged input; reading the picture will name what is wrong
            continue
    bits = max(8, most.bit_length())
    return None if most < 0 or bits >= 16 else 2**bits - 1


def white_note(white: int) -> str:
    """What is said of such pictures."""
    return f"16-bit pictures use values up to {white} only, which is taken as white in all of them"
