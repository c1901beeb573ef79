"""A corpus: image shards with their manifest."""

from dataclasses import dataclass
from functools import cached_property

from cluster import storage
from sst.data.shards import MANIFEST, Manifest, ShardInfo
from sst.errors import UserError


@dataclass(frozen=True)
class Corpus:
    """The shards a run reads."""

    url: str
    manifest: Manifest
    manifest_hash: str

    @classmethod
    def open(cls, url: str) -> "Corpus":
        """Reads the manifest.

        Raises:
            ValueError: if there is none, or shards do not match it.
        """
        manifest = Manifest.load(url)
        manifest.check(url)
        return cls(url, manifest, storage.sha256(storage.read_bytes(storage.join(url, MANIFEST))))

    @cached_property
    def train(self) -> tuple[ShardInfo, ...]:
        """Shards of the training split."""
        return self.manifest.shards_of("train")


def open_corpus(url: str) -> Corpus:
    """The corpus at a URL, checked against its manifest.

    Raises:
        UserError: if there is none, it does not match its manifest, or has no training images.
    """
    try:
        corpus = Corpus.open(url)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not corpus.train:
        raise UserError(f"{url}: no shard of the training split; pack again with a smaller --test-share")
    return corpus
