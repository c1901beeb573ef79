"""The embedded corpus of drawings."""

from functools import partial

from sst.corpora.packing import Item, SourceImage, split_of
from sst.errors import UserError


def items(count: int, seed: int, size: int, test_share: float = 0.1) -> list[Item]:
    """Images of the embedded corpus, drawn only when loaded.

    Args:
        count: number of images.
        seed: names the corpus.
        size: height and width in pixels.
        test_share: share of test images.

    Raises:
        UserError: if there would be no image.
    """
    if count < 1:
        raise UserError(f"count: at least 1 image is needed, got {count}")

    def load(index: int) -> SourceImage:
        from sst.corpora.drawings import draw

        drawn = draw(seed, index, size)
        return SourceImage(drawn.image, drawn.box, drawn.points, drawn.visible)

    names = [f"toy-{seed}-{index:07d}" for index in range(count)]
    return [Item(name, split_of(name, test_share), None, partial(load, i)) for i, name in enumerate(names)]
