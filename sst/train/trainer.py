"""The train loop of one worker: phases of optimizer steps, and between them the making of rounds.

Everything here runs without Ray, alone or in a DDP group. The order of samples and all random numbers are functions of
(seed, rank, step), so a resumed run repeats what it would have done.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import nn

from cluster import storage
from sst.config import TrainSettings
from sst.data.corpus import Corpus
from sst.data.loader import Undecodable, balanced, batches, training_examples
from sst.data.shards import ShardInfo, read_shard
from sst.errors import Stopped
from sst.nn.geometry import SCORING_SIZE
from sst.nn.network import DetectorDescriptor, LandmarkDetector
from sst.nn.optimizer import Update
from sst.nn.precision import Precision, laid_out, obstacle_to_compiling, uses_bf16
from sst.nn.steps import Batch, stage1_losses, stage2_losses
from sst.train.checkpoint import latest_checkpoint, write_checkpoint
from sst.train.consistency import equivariance_error, repeatability
from sst.train.extraction import Predictions, predict_shard, shard_symmetry
from sst.train.meters import Figures, Skips
from sst.train.model import keep_landmarks, save_model
from sst.train.rounds import RoundMaker
from sst.train.run_directory import LandmarkRecord, RoundRecord, RunDirectory
from sst.train.schedule import Phase, derived_seed, images_of_step, learning_rate, plan
from sst.train.tools import Tools
from sst.train.workers import Group

logger = logging.getLogger(__name__)

DATA_SEED, STEP_SEED, WEIGHT_SEED = 2, 3, 4
"""Purpose numbers in `derived_seed`."""

LOG_STEPS = 20
"""Optimizer steps between two lines of figures; as often it is seen which were skipped, and whether to stop."""


@dataclass
class Trainer:
    """One worker's share of a run."""

    settings: TrainSettings
    corpus: Corpus
    run: RunDirectory
    group: Group
    tools: Tools

    def __post_init__(self) -> None:
        self.settings = self.settings.with_precision(self._settled_precision())
        self.rounds = RoundMaker(self.settings, self.corpus, self.run, self.group, self.tools)
        self.phases = plan(self.settings, sum(shard.samples for shard in self.corpus.train))
        self.settings_hash, *earlier = (
            storage.sha256(text.encode())
            for text in (self.settings.method_json(), *self.settings.earlier_method_json())
        )
        self.known_hashes = {self.settings_hash, *earlier}
        self.checkpoints = storage.join(self.run.url, "checkpoints")
        self.undecodable = Undecodable()
        self.skips = Skips(self.group, self.run, self.tools)
        self.compiles, obstacle = settled_compiling(self.settings.resources.compile, self.group)
        line = {"device": str(self.group.device), "convolutions": self.settings.resources.precision}
        self.tools.log({"kind": "arithmetic", "compiled": self.compiles, "obstacle": obstacle} | line)

    def __call__(self) -> LandmarkDetector:
        """Runs what is left of the run, from the latest checkpoint on; round 0 must be there.

        Returns:
            The trained landmark detector, one channel per cluster, in eval mode.

        Raises:
            FloatingPointError: if losses stay without a finite value.
            RuntimeError: if a GPU's memory is full; the message has what to try.
            Stopped: after a checkpoint, if `tools.stop` asks for it.
            ValueError: if a shard or record is damaged, or too few descriptors are found.
        """
        first, done = self._restore()
        for index, phase in enumerate(self.phases[first:], start=first):
            record = self.run.record(phase.round)
            if phase.stage == 2 and isinstance(self.model, DetectorDescriptor):
                self._start_stage2(len(record.active))
            try:
                self._train(index, done if index == first else 0, record)
            except torch.OutOfMemoryError as error:
                raise RuntimeError(out_of_memory(self.settings, phase.stage)) from error
            if index + 1 < len(self.phases) and not self.run.has_round(phase.round + 1):
                self._make_round(record, phase.first_step + phase.steps)
        assert isinstance(self.model, LandmarkDetector)
        return self.model.eval()

    def _settled_precision(self) -> Precision:
        """What convolutions are computed in, the same on all workers; noted in settings.json for later starts."""
        told, device = self.settings.resources.precision, self.group.device
        precision: Precision = "bf16" if all(self.group.gather(uses_bf16(device, told))) else "float32"
        if told == "auto" and self.group.rank == 0:
            self.run.note_precision(precision)
        return precision

    def _make_round(self, record: RoundRecord, step: int) -> None:
        model = self.model.eval()
        if isinstance(model, DetectorDescriptor):
            self.rounds.correspondence(model, self.called, record, step)
        else:
            self.rounds.merge(model, self.called, record, step)

    def _fast(self, model: nn.Module, dynamic: bool | None = None) -> nn.Module:
        """The model as it is called: compiled, where that is done, perhaps for batches of any size."""
        return cast(nn.Module, torch.compile(model, dynamic=dynamic)) if self.compiles else model

    def finish(self, model: LandmarkDetector) -> None:
        """Writes the landmark model and its predictions on every image of the corpus."""
        active = self.run.record(self.phases[-1].round).active
        channels = [channel for channel, is_active in enumerate(active) if is_active]
        channels = self._best(model, channels)
        model = keep_landmarks(model, channels)
        shards = balanced(self.corpus.manifest.shards, self.group.world)[self.group.rank]
        figures: dict[str, float] = {}
        for done, shard in enumerate(shards, start=1):
            predicted = predict_shard(model, self.corpus, shard, self.settings)
            figures = figures or self._landmark_figures(model, shard, predicted)
            storage.save_npz(
                self.run.predictions_url(shard.file), points=predicted.points, confidence=predicted.confidence
            )
            self.tools.log({"kind": "shards", "what": "predict", "done": done, "total": len(shards)})
        self.group.wait()
        if self.group.rank == 0:
            self._write_landmarks(model)
            save_model(
                self.run.model_url,
                model,
                network=self.settings.network,
                clusters=channels,
                visible=self.settings.stage2.visible,
                figures=figures,
            )
        self.group.wait()

    def _best(self, model: LandmarkDetector, channels: list[int]) -> list[int]:
        """The channels to keep; all, unless `stage2.most_landmarks` bounds them."""
        most = self.settings.stage2.most_landmarks
        if most is None or len(channels) <= most:
            return channels
        kept: list[int] = []
        if self.group.rank == 0:
            shard = self.corpus.train[0]
            model = keep_landmarks(model, channels)
            share = repeatability(*self._warped_twice(model, shard), self.settings.stage2.merge_radius)
            kept = sorted(channels[number] for number in np.argsort(-share, kind="stable")[:most])
        return list(self.group.gather(kept)[0])

    def _warped_twice(
        self, model: LandmarkDetector, shard: ShardInfo, predicted: Predictions | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Visible landmarks of a shard's images, and of warped copies moved back; (N, K, 2), NaN = not visible."""
        plain = predicted or predict_shard(model, self.corpus, shard, self.settings)
        again = predict_shard(model, self.corpus, shard, self.settings, warp_seed=self.settings.seed)
        visible = self.settings.stage2.visible
        return plain.visible_points(visible), again.visible_points(visible)

    def _write_landmarks(self, model: LandmarkDetector) -> None:
        """Writes landmarks.json: of each landmark its repeatability and its partner in mirrored images."""
        shard, visible = self.corpus.manifest.shards[-1], self.settings.stage2.visible
        again = repeatability(*self._warped_twice(model, shard), self.settings.stage2.merge_radius)
        symmetry = shard_symmetry(model, self.corpus, shard, self.settings, visible)
        record = LandmarkRecord(
            images=shard.samples,
            repeatability=again.tolist(),
            partner=symmetry.partner.tolist(),
            swap_share=symmetry.swap_share.tolist(),
        )
        storage.write_json(storage.join(self.run.url, "landmarks.json"), record.model_dump())

    def _landmark_figures(self, model: LandmarkDetector, shard: ShardInfo, predicted: Predictions) -> dict[str, float]:
        """What one shard tells without annotations: visibility, what of its images the boxes cover, equivariance."""
        first, second = self._warped_twice(model, shard, predicted)
        error = equivariance_error(first, second, SCORING_SIZE)
        boxes = [sample.box_share for sample in read_shard(f"{self.corpus.url}/{shard.file}", shard.sha256)]
        figures = {
            "visible_share": float(np.isfinite(first[..., 0]).mean()) if first.size else 0.0,
            "box_share": float(np.mean(boxes)),
        }
        return figures | ({"equivariance_error": error} if np.isfinite(error) else {})

    def _train(self, index: int, done: int, record: RoundRecord) -> None:
        """Steps of one phase, from step `done` of it on."""
        phase = self.phases[index]
        active = torch.tensor(record.active, device=self.group.device)
        partner = None if record.partner is None else torch.tensor(record.partner, device=self.group.device)
        generator = torch.Generator(self.group.device)
        self.model.train()
        share = self.group.share_of(self._batch_size(phase))
        figures = Figures(phase, images_of_step(self.settings, phase.stage), self.group.world)
        stream = self._stream(phase, done, record) if done < phase.steps else iter(())
        for step in range(done, phase.steps):
            with figures.waiting():
                batch = next(stream).to(self.group.device)
            global_step = phase.first_step + step
            generator.manual_seed(derived_seed(self.settings.seed, STEP_SEED, self.group.rank, global_step))
            self.model.zero_grad()
            if phase.stage == 1:
                losses = stage1_losses(self.trained, batch, self.settings, generator)
            else:
                losses = stage2_losses(self.trained, batch, active, self.settings, generator, partner)
            # DDP takes the mean over the workers, each of which has the mean over its share of the batch.
            (losses["loss"] * (share * self.group.world / self._batch_size(phase))).backward()
            # DDP has averaged the gradients, so their norm, and what follows from it, is the same on all ranks.
            rate = learning_rate(self.settings, phase, step)
            norm, finite = self.update(rate)
            figures.add(losses | {"gradient_norm": norm})
            self.skips.add(global_step, batch.keys, finite)
            last = step + 1 == phase.steps
            stop = (global_step + 1) % LOG_STEPS == 0 and self._stop_asked()
            saves = (step + 1) % self.settings.resources.checkpoint_steps == 0 or last or stop
            if (step + 1) % LOG_STEPS == 0 or saves:
                self.skips.look()
            if (step + 1) % LOG_STEPS == 0 or last:
                self.tools.log(figures.line(global_step + 1, step + 1) | {"learning_rate": rate})
            if saves:
                self._checkpoint(index, step + 1)
            if stop:
                raise Stopped
        reasons = {key: why for own in self.group.gather(self.undecodable.reasons) for key, why in own.items()}
        if reasons:
            self.tools.log({"kind": "undecodable", "samples": reasons})

    def _stop_asked(self) -> bool:
        """Whether the run is to end; all workers answer alike."""
        return any(self.group.gather(self.group.rank == 0 and self.tools.stop()))

    def _stream(self, phase: Phase, done: int, record: RoundRecord) -> Iterator[Batch]:
        examples = training_examples(
            self.corpus.url,
            self.corpus.manifest,
            lambda shard: self.run.labels(record, shard),
            self.settings.stage1.min_labels if phase.stage == 1 else 1,
            self.group.rank,
            self.group.world,
            # Two phases on the labels of one round do not exist, so the round tells them apart.
            derived_seed(self.settings.seed, DATA_SEED, phase.round) % 2**32,
        )
        share, view = self.group.share_of(self._batch_size(phase)), self.settings.network.input_size
        return batches(examples, share, view, skip=done, bad=self.undecodable)

    def _batch_size(self, phase: Phase) -> int:
        """Images, or pairs, of a step over all workers."""
        return self.settings.stage1.pairs if phase.stage == 1 else self.settings.stage2.batch

    def _restore(self) -> tuple[int, int]:
        """Builds model and optimizer as they were; returns phase index and steps done in it."""
        torch.manual_seed(derived_seed(self.settings.seed, WEIGHT_SEED))
        found = latest_checkpoint(self.checkpoints)
        self.model: DetectorDescriptor | LandmarkDetector = DetectorDescriptor(self.settings.network.shape)
        self._begin_stage()
        if found is None:
            return 0, 0
        record, tensors = found
        if record.settings not in self.known_hashes:
            raise ValueError(f"{self.checkpoints} belongs to other settings; take another --name for these")
        if record.stage == 2:
            self._start_stage2(len(self.run.record(self.phases[record.phase].round).active))
        self.model.load_state_dict(tensors["model.safetensors"])
        self.update.restore(tensors["optimizer.safetensors"])
        self.tools.log({"kind": "resume", "step": record.step})
        return record.phase, record.phase_step

    def _start_stage2(self, landmarks: int) -> None:
        assert isinstance(self.model, DetectorDescriptor)
        torch.manual_seed(derived_seed(self.settings.seed, WEIGHT_SEED, 2))
        self.model = LandmarkDetector.from_stage1(self.model.cpu(), landmarks)
        self._begin_stage()

    def _begin_stage(self) -> None:
        """Puts a stage's model on the device, with its optimizer, and as it is called with and without gradients."""
        stage = self.settings.stage1 if isinstance(self.model, DetectorDescriptor) else self.settings.stage2
        self.model = laid_out(self.model, self.group.device, self.compiles)
        self.update = Update(self.model, stage.learning_rate, stage.weight_decay)
        # Compiled outside of DDP's wrapper, so that gradients are still sent while others are computed.
        self.trained = self._fast(self.group.wrap(self.model), dynamic=False)
        self.called = self._fast(self.model)

    def _checkpoint(self, index: int, phase_step: int) -> None:
        phase = self.phases[index]
        if self.group.rank == 0:
            write_checkpoint(
                self.checkpoints,
                self.model,
                self.update.state(),
                step=phase.first_step + phase_step,
                phase=index,
                phase_step=phase_step,
                stage=phase.stage,
                settings=self.settings_hash,
            )
        self.group.wait()


def settled_compiling(asked: bool | None, group: Group) -> tuple[bool, str | None]:
    """Whether models are compiled, the same on all workers, and what keeps a GPU from it.

    Raises:
        RuntimeError: if it is asked for where it does not work.
    """
    compiles = group.device.type == "cuda" if asked is None else asked
    obstacles = [each for each in group.gather(obstacle_to_compiling(group.device) if compiles else None) if each]
    if asked and obstacles:
        raise RuntimeError(f"--resources.compile: torch.compile does not work here ({obstacles[0]}); leave it out")
    return compiles and not obstacles, next(iter(obstacles), None)


def out_of_memory(settings: TrainSettings, stage: int) -> str:
    """What to say when a GPU's memory is full: what was asked for, what there is, and what to try."""
    name, size = ("stage1.pairs", settings.stage1.pairs) if stage == 1 else ("stage2.batch", settings.stage2.batch)
    workers = settings.resources.least_workers
    least = 2 * workers if stage == 1 else workers
    smaller = max(least, size // 2 // workers * workers)
    total = torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else float("nan")
    hint = (
        f"try --{name} {smaller}"
        if smaller < size
        else f"try a smaller --network.input-size than {settings.network.input_size}"
    )
    return (
        f"out of GPU memory in stage {stage}: {name} {size} on {workers} workers at {settings.network.input_size} px, "
        f"{total:.0f} GB; {hint}, or more workers (process {os.getpid()})"
    )
