"""Damaged and arbitrary input for every reader of bytes from outside, and the errors that each may answer with.

Used by tests/test_fuzz.py (a short, seeded run) and benchmarks/fuzz.py (a long one).
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from pydantic import ValidationError

from cluster import storage
from cluster.shards import Descriptors, Labels
from sst.config import TrainSettings
from sst.corpora.annotation_files import read_annotations
from sst.corpora.drawings import draw
from sst.corpora.packing import UnusableImage, read_image
from sst.data.jpeg import decode_jpeg_scaled
from sst.data.shards import Manifest, SampleMeta, ShardWriter, read_shard
from sst.errors import UserError
from sst.nn.network import LandmarkDetector
from sst.nn.optimizer import Update
from sst.predict.naming import NamedPoints, load_names, save_names
from sst.predict.published import read_published
from sst.run.metrics import MetricsFile, MetricsReader
from sst.train.checkpoint import copied, latest_checkpoint, write_checkpoint
from sst.train.model import load_model, save_model
from sst.train.run_directory import LandmarkRecord, RoundRecord, RunDirectory
from sst.tune.search_space import parse_space, read_space
from tests.small import SETTINGS


@dataclass(frozen=True)
class Case:
    """A reader of one file.

    Attributes:
        name: what is read.
        file: the file that is damaged.
        read: reads it.
        errors: what the reader may raise; () for nothing.
    """

    name: str
    file: Path
    read: Callable[[], Any]
    errors: tuple[type[Exception], ...]


def cases(root: Path) -> list[Case]:
    """Sound files of every kind under a folder, and their readers."""
    image = np.ascontiguousarray(draw(0, 0, 48).image)
    with ShardWriter(str(root / "corpus"), "toy") as writer:
        for number in range(3):
            points = ((1.0, 2.0), (3.0, 4.0))
            meta = SampleMeta(
                source=f"{number}.jpg", split="train", box=(0.0, 0.0, 48.0, 48.0), points=points, visible=(True, False)
            )
            writer.add(simplejpeg.encode_jpeg(image, 80), meta)
    Labels(
        np.array([0, 2, 3]), np.zeros((3, 2), np.float32), np.arange(3, dtype=np.int16), np.zeros(3, np.float32)
    ).save(str(root / "labels.npz"))
    Descriptors(np.array([0, 2, 3]), np.zeros((3, 2), np.float32), np.ones((3, 4), np.float16)).save(
        str(root / "descriptors.npz")
    )
    small = torch.nn.Linear(2, 2)
    optimizer = Update(small, 0.01, 0.0).state()
    position = {"step": 5, "phase": 0, "phase_step": 5, "stage": 1, "settings": "0" * 64}
    write_checkpoint(str(root / "checkpoints"), copied(small, optimizer), **position)
    network = SETTINGS.network
    model = LandmarkDetector(network.shape, 2)
    weights = save_model(str(root / "model"), model, network=network, clusters=[0, 1], visible=0.2).weights
    save_names(
        str(root / "model"),
        NamedPoints(
            names=["nose"], images=3, model=weights, used=[True, True], shape=[(1.0, 2.0), (3.0, 4.0)],
            places=[(2.0, 2.0)], weights=[[0.0, 0.0]] * 4,
        ),
    )  # fmt: skip
    record = RoundRecord(
        number=0, kind="keypoints", step=0, weights=None, manifest="0" * 64, seed=1, backend="torch",
        thresholds=[1.0, 2.0], active=[True, False], population=[3, 4], metrics={"inertia": 0.5}, seconds={"fit": 1.0},
    )  # fmt: skip
    RunDirectory(str(root / "run")).finish_round(record, None)
    steady = LandmarkRecord(images=3, repeatability=[0.5], partner=[-1], swap_share=[0.0])
    storage.write_json(str(root / "run" / "landmarks.json"), steady.model_dump())
    metrics = MetricsFile(str(root / "run"))
    for step in range(5):
        metrics.write({"kind": "step", "step": step, "loss": 0.5})
    (root / "a.csv").write_text("file,split,box_x0,box_y0,box_x1,box_y1,x0,y0\na.jpg,train,1,2,3,4,5,6\nb.jpg,,,,,,,\n")
    coco = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 5, "height": 5}],
        "annotations": [{"id": 1, "image_id": 1, "bbox": [1, 2, 3, 4], "keypoints": [1, 2, 2, 3, 4, 0], "iscrowd": 0}],
        "categories": [{"id": 1, "keypoints": ["nose", "tail"]}],
    }
    (root / "a.json").write_text(json.dumps(coco))
    (root / "settings.json").write_text(TrainSettings().model_dump_json())
    for suffix in ("png", "jpg", "bmp", "webp", "tif"):
        Image.fromarray(image[:24, :24]).save(root / f"image.{suffix}")
    torch.save({"state_dict": {"a": torch.zeros(2)}, "centroid": np.zeros((2, 2))}, root / "published.pth")

    (root / "space.yaml").write_text(
        "cluster.clusters: [20, 30]\nstage1.learning_rate: 1e-4..1e-3:log\nstage2.visible: {low: 0.1, high: 0.4}\n"
    )

    def annotations(name: str) -> Callable[[], Any]:
        return lambda: read_annotations(str(root / name))

    def picture(suffix: str) -> Case:
        path = root / f"image.{suffix}"
        return Case(f"{suffix} image", path, lambda: read_image(path), (UnusableImage,))

    def metric_lines() -> None:
        assert all(isinstance(line, dict) for line in MetricsReader(str(root / "run")).new_lines())

    corpus, step = str(root / "corpus"), root / "checkpoints" / "0000000005"
    jpeg = root / "image.jpg"
    return [
        Case("manifest", root / "corpus" / "manifest.json", lambda: Manifest.load(corpus), (ValueError,)),
        Case(
            "shard", root / "corpus" / "shard-00000.tar",
            lambda: list(read_shard(f"{corpus}/shard-00000.tar")), (ValueError,),
        ),
        Case("labels", root / "labels.npz", lambda: Labels.load(str(root / "labels.npz")), (ValueError,)),
        Case(
            "descriptors", root / "descriptors.npz",
            lambda: Descriptors.load(str(root / "descriptors.npz")), (ValueError,),
        ),
        Case("checkpoint record", step / "record.json", lambda: latest_checkpoint(str(root / "checkpoints")), ()),
        Case("checkpoint", step / "model.safetensors", lambda: latest_checkpoint(str(root / "checkpoints")), ()),
        Case("model record", root / "model" / "model.json", lambda: load_model(str(root / "model")), (ValueError,)),
        Case("weights", root / "model" / "model.safetensors", lambda: load_model(str(root / "model")), (ValueError,)),
        Case("names", root / "model" / "names.json", lambda: load_names(str(root / "model")), (UserError,)),
        Case(
            "round record", root / "run" / "rounds" / "0000" / "record.json",
            lambda: RunDirectory(str(root / "run")).record(0), (ValueError,),
        ),
        Case(
            "landmark record", root / "run" / "landmarks.json",
            lambda: RunDirectory(str(root / "run")).landmarks(), (ValueError,),
        ),
        Case("metrics", root / "run" / "metrics.jsonl", metric_lines, ()),
        Case("CSV", root / "a.csv", annotations("a.csv"), (UserError,)),
        Case("COCO", root / "a.json", annotations("a.json"), (UserError,)),
        Case(
            "settings", root / "settings.json",
    lambda: TrainSettings.model_validate_json((root / "settings.json").read_bytes()), (ValidationError,),
        ),
        *(picture(suffix) for suffix in ("png", "jpg", "bmp", "webp", "tif")),
        Case("stored image", jpeg, lambda: decode_jpeg_scaled(jpeg.read_bytes(), 0.5), (ValueError,)),
        Case(
            "search space", root / "space.yaml",
            lambda: parse_space(read_space(str(root / "space.yaml")), SETTINGS), (UserError,),
        ),
        Case("published", root / "published.pth", lambda: read_published(root / "published.pth"), (UserError,)),
    ]  # fmt: skip


ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, -(2**70), 1e308, "", "x", "../../x", "\x00", "é" * 50, [], {}, [[]], [None],
    0.5, "NaN", "Infinity", {"a": []}, [1e400], "1" * 5000,
)  # fmt: skip


def changed_json(rng: random.Random, value: Any) -> Any:
    """The value with one part somewhere in it replaced, removed or repeated."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if rng.random() < 0.05:
            return value | {rng.choice(["extra", "", "__class__"]): rng.choice(ODD)}
        return value | {key: changed_json(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        if rng.random() < 0.15:
            return value[:place] + value[place + 1 :]
        if rng.random() < 0.15:
            return value + [value[place]]
        return [*value[:place], changed_json(rng, value[place]), *value[place + 1 :]]
    return rng.choice(ODD)


def changed_bytes(rng: random.Random, data: bytes) -> bytes:
    """The data with some bytes flipped, cut, inserted, repeated or swapped; sometimes something else altogether."""
    kind, size = rng.random(), len(data)
    if kind < 0.05:
        return rng.randbytes(rng.randrange(200))
    if kind < 0.2:
        return data[: rng.randrange(size + 1)]
    if kind < 0.3:
        at, length = rng.randrange(size), rng.randrange(1, 64)
        return data[:at] + data[at + length :]
    if kind < 0.4:
        at = rng.randrange(size)
        return data[:at] + rng.randbytes(rng.randrange(1, 32)) + data[at:]
    if kind < 0.5:
        at, length = rng.randrange(size), rng.randrange(1, 600)
        return data[: at + length] + data[at:]
    result = bytearray(data)
    for _ in range(2 ** rng.randrange(6)):
        # Heads hold sizes and kinds: the most can go wrong there.
        at = rng.randrange(min(size, 64)) if rng.random() < 0.3 else rng.randrange(size)
        result[at] = rng.choice([rng.randrange(256), 0, 255, result[at] ^ (1 << rng.randrange(8))])
    return bytes(result)


def damaged(rng: random.Random, case: Case, sound: bytes) -> bytes:
    """A damaged version of a sound file."""
    if case.file.suffix == ".json" and rng.random() < 0.7:
        value = json.loads(sound)
        for _ in range(rng.randrange(1, 3)):
            value = changed_json(rng, value)
        return json.dumps(value).encode()
    return changed_bytes(rng, sound)


def fuzz(root: Path, inputs: int, seed: int) -> dict[str, dict[str, int]]:
    """Gives every reader so many damaged files.

    Args:
        root: an empty folder.
        inputs: number for each reader.
        seed: of the damage.

    Returns:
        Reader: how often it accepted, and how often it raised each of its errors.

    Raises:
        AssertionError: with reader, input and error, if a reader raised anything else.
    """
    counts: dict[str, dict[str, int]] = {}
    for case in cases(root):
        rng, sound = random.Random(f"{seed} {case.name}"), case.file.read_bytes()
        own = counts.setdefault(case.name, {})
        for _ in range(inputs):
            data = damaged(rng, case, sound)
            case.file.write_bytes(data)
            try:
                case.read()
                outcome = "accepted"
            except case.errors as error:
                outcome = type(error).__name__
            except BaseException as error:
                raise AssertionError(f"{case.name}: {type(error).__name__}: {error}; input {data[:300]!r}") from error
            own[outcome] = own.get(outcome, 0) + 1
        case.file.write_bytes(sound)
    return counts
