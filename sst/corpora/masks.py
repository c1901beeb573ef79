"""Masks of COCO, of which the box is wanted.

A mask is run lengths, background and object in turns, down the first column, then down the next. They are a list of
numbers, or a text of them.

Source: cocoapi, common/maskApi.c (rleFrString, rleToBbox).
"""

from collections.abc import Sequence
from itertools import accumulate

from sst.corpora.annotations import Box

LONGEST = 7
"""Characters of one number: enough for an image of 2**34 pixels."""


def mask_box(size: Sequence[int], counts: Sequence[int] | str) -> Box | None:
    """The box around the object; None around nothing.

    Args:
        size: height and width of the image.
        counts: run lengths, as numbers or as text.

    Raises:
        ValueError: if they are not those of such an image.
    """
    height, width = size
    runs = _numbers(counts) if isinstance(counts, str) else [int(count) for count in counts]
    ends = list(accumulate(runs))
    if height < 1 or width < 1 or min(runs, default=0) < 0 or not ends or ends[-1] != height * width:
        raise ValueError("run lengths that are not of an image of this size")
    parts = [(start, end - 1) for start, end in zip(ends[::2], ends[1::2], strict=False) if start < end]
    if not parts:
        return None
    x0, x1 = parts[0][0] // height, parts[-1][1] // height
    if any(first // height < last // height for first, last in parts):  # down to the bottom, and on from the top
        return float(x0), 0.0, float(x1 + 1), float(height)
    return (
        float(x0),
        float(min(first % height for first, _ in parts)),
        float(x1 + 1),
        float(max(last % height for _, last in parts) + 1),
    )


def _numbers(text: str) -> list[int]:
    """Numbers of five bits a character, low ones first; from the fourth on, each is what the last but one grew by."""
    numbers: list[int] = []
    value = length = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or length == LONGEST:
            raise ValueError(f"{character!r} in run lengths")
        value |= (bits & 31) << 5 * length
        length += 1
        if bits & 32:  # more follows
            continue
        if bits & 16:  # negative
            value -= 1 << 5 * length
        numbers.append(value + (numbers[-2] if len(numbers) > 2 else 0))
        value = length = 0
    if length:
        raise ValueError("run lengths that end within a number")
    return numbers
