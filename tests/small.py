"""A corpus and settings small enough to train in seconds."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch

from cluster.actor import read_sample
from cluster.kmeans import fit
from sst.config import (
    ClusterSettings,
    KeypointSettings,
    NetworkSettings,
    ResourceSettings,
    Stage1Settings,
    Stage2Settings,
    TrainSettings,
)
from sst.corpora.drawings import draw
from sst.data.corpus import Corpus
from sst.data.shards import SampleMeta, ShardWriter
from sst.train.finish import Finisher
from sst.train.first_round import make_first_round
from sst.train.run_directory import RunDirectory
from sst.train.tools import Tools
from sst.train.trainer import Trainer
from sst.train.workers import Group

SETTINGS = TrainSettings(
    seed=1,  # so short a training keeps few labels of its first round; with this seed more than chance would
    network=NetworkSettings(input_size=64, width=16, depth=2, groups=2, descriptor_size=16),
    keypoints=KeypointSettings(max_num_keypoints=20, outlier_reference=500, outlier_neighbours=5),
    cluster=ClusterSettings(clusters=8, sample=2_000),
    stage1=Stage1Settings(warmup_iterations=6, rounds=2, round_iterations=4, pairs=4, min_labels=2, threshold=0.05),
    stage2=Stage2Settings(
        iterations=9,
        batch=4,
        milestones=(6,),
        min_population=2,
        merge_after=3,
        merge_every=3,
        refine_rounds=1,
        refine_iterations=3,
        refine_confidence=0.0,  # so few steps leave every answer unsure
        refine_radius=100.0,
    ),
    resources=ResourceSettings(workers=1, checkpoint_steps=3),
)


def write_toy(url: str, train: int, test: int, shard_samples: int = 16, annotated: bool = True) -> None:
    """Packs drawings of the embedded corpus."""
    with ShardWriter(url, "toy", "toy", shard_samples) as writer:
        for index in range(train + test):
            drawn = draw(5, index, 96)
            x0, y0, x1, y1 = map(float, drawn.box)
            writer.add(
                simplejpeg.encode_jpeg(drawn.image, 95, colorsubsampling="444"),
                SampleMeta(
                    source=f"drawing {index}",
                    split="train" if index < train else "test",
                    box=(x0, y0, x1, y1),
                    points=tuple((float(x), float(y)) for x, y in drawn.points) if annotated else None,
                    visible=tuple(map(bool, drawn.visible)) if annotated else None,
                ),
            )


def write_scenes(url: str, images: int = 24) -> None:
    """Four letters that walk about before a constant background of grey rings, as a fixed camera sees it."""
    rng, side = np.random.default_rng(0), 112  # of the square object box, in stored pixels
    background = np.full((256, 256, 3), 128, np.uint8)
    for _ in range(60):
        centre, grey = rng.integers(0, 256, 2).tolist(), int(rng.integers(0, 255))
        cv2.circle(background, centre, int(rng.integers(3, 9)), (grey, grey, grey), 2)
    with ShardWriter(url, "scenes", None, 6) as writer:
        for index in range(images):
            image = background.copy()
            left, top = rng.integers(16, 240 - side, 2).tolist()
            for letter, x, y in (("K", 24, 50), ("S", 64, 50), ("R", 24, 92), ("A", 64, 92)):
                at = rng.integers(-2, 3, 2) + (left + x, top + y)
                cv2.rectangle(image, (at - (4, 30)).tolist(), (at + (30, 6)).tolist(), (40, 90, 200), -1)
                cv2.putText(image, letter, at.tolist(), cv2.FONT_HERSHEY_SIMPLEX, 1.0, (250, 250, 120), 3)
            box = (float(left), float(top), float(left + side), float(top + side))
            view = (box[0] - 8, box[1] - 8, box[2] + 8, box[3] + 8)
            writer.add(
                simplejpeg.encode_jpeg(image, 95, colorsubsampling="444"),
                SampleMeta(source=f"scene {index}", split="train", box=view, object_box=box),
            )


def local_tools(lines: list[dict[str, Any]], settings: TrainSettings = SETTINGS) -> Tools:
    """Everything in this process; figures are appended to `lines`."""
    return Tools(
        lambda sample, asked: fit(read_sample(sample), asked),
        log=lines.append,
    )


def train_locally(corpus_url: str, run_url: str, tools: Tools, settings: TrainSettings = SETTINGS) -> Trainer:
    """A whole run in this process; returns its trainer."""
    torch.set_num_threads(1)
    corpus, run = Corpus.open(corpus_url), RunDirectory(run_url)
    make_first_round(settings, corpus, run, tools)
    trainer = Trainer(settings, corpus, run, Group(), tools)
    network = trainer()
    Finisher(trainer.settings, corpus, run, Group(), tools)(network, run.records()[-1])
    return trainer


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
