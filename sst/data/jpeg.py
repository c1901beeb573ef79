"""Decoding of stored images."""

import io
import math

import numpy as np

MAX_PIXELS = 64_000_000
"""Larger images are refused before they are decoded, as a guard against decompression bombs."""


_DCT_STEPS = 8  # libjpeg decodes at n/8 of the size


def decode_jpeg(jpeg: bytes, min_side: int | None = None) -> np.ndarray:
    """Decodes a JPEG to RGB uint8 (H, W, 3).

    Args:
        jpeg: the bytes.
        min_side: permits the smallest of libjpeg's sizes whose shorter side has so many pixels.

    Raises:
        ValueError: if the image cannot be decoded.
    """
    if min_side is None:
        return decode_jpeg_scaled(jpeg)[0]
    import simplejpeg

    try:
        height, width = simplejpeg.decode_jpeg_header(jpeg)[:2]
    except ValueError:
        return decode_jpeg_scaled(jpeg)[0]
    return decode_jpeg_scaled(jpeg, min_side / min(height, width))[0]


def decode_jpeg_scaled(jpeg: bytes, min_scale: float = 1.0) -> tuple[np.ndarray, float, float]:
    """Decodes a JPEG at the smallest n/8 of its size that is at least `min_scale`.

    libjpeg drops high frequencies of each block (an area average, in effect), so stored x comes to lie at
    (x + 0.5) * n/8 - 0.5. It rounds the size up to whole pixels: the last row and column may lie partly
    beyond the stored image. Therefore the exact scale is decoded size / spanned size, not decoded size /
    stored size. simplejpeg chooses the smallest n that gives at least `min_height` and `min_width`, and never
    magnifies.

    Returns:
        RGB uint8 (H, W, 3); height and width that it spans in pixels of the stored image, less than 8 more
        than stored.

    Raises:
        ValueError: if the image cannot be decoded.
    """
    import simplejpeg

    try:
        height, width = simplejpeg.decode_jpeg_header(jpeg)[:2]
        if height * width > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels; at most {MAX_PIXELS} are permitted")
        step = min(_DCT_STEPS, max(1, math.ceil(min_scale * _DCT_STEPS - 1e-9)))
        if max(height, width) < 8 * _DCT_STEPS or step == _DCT_STEPS:  # small: no gain, sizes ambiguous
            return simplejpeg.decode_jpeg(jpeg), height, width
        minimum = [-(-side * step // _DCT_STEPS) for side in (height, width)]
        image = simplejpeg.decode_jpeg(jpeg, min_height=minimum[0], min_width=minimum[1])
        if list(image.shape[:2]) != minimum:
            raise ValueError(f"libjpeg gave {image.shape[:2]} for {minimum}")
        return image, minimum[0] * _DCT_STEPS / step, minimum[1] * _DCT_STEPS / step
    except ValueError as error:
        return _decode_with_pillow(jpeg, error)


def _decode_with_pillow(jpeg: bytes, reason: ValueError) -> tuple[np.ndarray, float, float]:
    """For what simplejpeg refuses, such as CMYK; a cut file is refused here too."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(jpeg)) as file:
            if file.width * file.height > MAX_PIXELS:
                raise ValueError(f"{file.width} x {file.height} pixels; at most {MAX_PIXELS} are permitted")
            image = np.asarray(file.convert("RGB"))
    except Exception as error:  # Pillow raises many types on damaged input
        raise ValueError(f"not a readable JPEG ({reason})") from error
    return image, image.shape[0], image.shape[1]
