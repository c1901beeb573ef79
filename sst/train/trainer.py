"""The train loop of one worker: phases of optimizer steps, and between them the making of rounds.

Everything here runs without Ray, alone or in a DDP group. The order of samples and all random numbers are functions of
(seed, rank, step), so a resumed run repeats what it would have done.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from cluster import storage
from sst.config import TrainSettings
from sst.data.corpus import Corpus
from sst.data.loader import Undecodable, batches, training_examples
from sst.errors import Leaving, Stopped, Unwell
from sst.nn.network import DetectorDescriptor, LandmarkDetector, use_kernels
from sst.nn.optimizer import Update
from sst.nn.precision import Precision, laid_out, uses_bf16
from sst.nn.replay import own_stream, seeded, training_step
from sst.nn.steps import Batch, Losses, stage1_losses, stage2_losses
from sst.train.checkpoint import CheckpointWriter, latest_checkpoint
from sst.train.health import Watch, dead_scales, signs
from sst.train.meters import Meter, Skips
from sst.train.refinement import settled
from sst.train.rounds import RoundMaker
from sst.train.run_directory import RoundRecord, RunDirectory
from sst.train.schedule import Phase, derived_seed, learning_rate, plan
from sst.train.tools import Tools
from sst.train.workers import Group

DATA_SEED, STEP_SEED, WEIGHT_SEED = 2, 3, 4
"""Purpose numbers in `derived_seed`."""

LOG_STEPS = 20
"""Optimizer steps between two lines of metrics; as often it is seen which were skipped, and whether to stop."""


ASK_SECONDS = 1.0
"""Time between two looks at whether to stop, which may ask an object store and all workers."""


@dataclass(frozen=True)
class Learner:
    """A stage's network on its device, with its optimizer.

    Attributes:
        network: the weights.
        wrapped: the network as training calls it, in a DDP group where there are other workers.
        update: its optimizer.
    """

    network: DetectorDescriptor | LandmarkDetector
    wrapped: nn.Module
    update: Update


class Trainer:
    """One worker's share of a run."""

    def __init__(self, settings: TrainSettings, corpus: Corpus, run: RunDirectory, group: Group, tools: Tools) -> None:
        """Takes what is trained, on what, where it lies, with whom, and what the world around it offers."""
        self.settings, self.corpus, self.run, self.group, self.tools = settings, corpus, run, group, tools
        self.phases = plan(settings, sum(shard.samples for shard in corpus.train))
        self.undecodable = Undecodable()
        self.skips = Skips(group, run, tools)
        self.watch = Watch(signs(settings))
        self.checkpoints = CheckpointWriter(run.checkpoints_url)
        self._asked = -math.inf

    def __call__(self) -> LandmarkDetector:
        """Runs what is left of the run, from the latest checkpoint on; round 0 must be there.

        Returns:
            The trained landmark detector, one channel per cluster, in eval mode.

        Raises:
            FloatingPointError: if losses stay without a finite value.
            Leaving: after a checkpoint, when a machine of the group is about to be taken away.
            RuntimeError: if a GPU's memory is full; the message has what to try.
            Stopped: after a checkpoint, if `tools.stop` asks for it.
            Unwell: after a checkpoint, at a sign that the run comes to nothing, if `stop_when_unwell` is set.
            ValueError: if a shard or record is damaged, or too few descriptors are found.
        """
        with own_stream(self.group.device), self.checkpoints:
            return self._run()

    def _run(self) -> LandmarkDetector:
        """See `__call__`."""
        self._settle_arithmetic()
        rounds = RoundMaker(self.settings, self.corpus, self.run, self.group, self.tools)
        first, done = self._restore()
        for index, phase in enumerate(self.phases[first:], start=first):
            record = self.run.record(phase.round)
            if phase.refines and settled(self._agreement()):
                self.tools.log({"kind": "settled", "round": record.number})
                break
            if self._unwell(record.line() if record.kind in ("correspondence", "refinement") else None):
                raise Unwell
            if phase.stage == 2 and isinstance(self.learner.network, DetectorDescriptor):
                self._start_stage2(record)
            try:
                self._train(index, done if index == first else 0, record)
            except torch.OutOfMemoryError as error:
                raise RuntimeError(out_of_memory(self.settings, phase.stage)) from error
            if index + 1 < len(self.phases) and not self.run.has_round(phase.round + 1):
                self._make_round(rounds, record, self.phases[index + 1])
        return cast(LandmarkDetector, self.learner.network.eval())

    def _agreement(self) -> list[float]:
        """Per refinement so far, how far answers on images and on their warped copies lie apart, in % of the view."""
        return [each.metrics["equivariance_error"] for each in self.run.records() if each.kind == "refinement"]

    def _make_round(self, rounds: RoundMaker, record: RoundRecord, following: Phase) -> None:
        """Makes the labels that the following phase is trained on."""
        self.tools.at(f"making the labels of {following.name}")
        network = self.learner.network.eval()
        if isinstance(network, DetectorDescriptor):
            rounds.correspondence(network, record, following.first_step)
        elif following.refines:
            rounds.refine(network, record, following.first_step)
        else:
            rounds.merge(network, record, following.first_step)

    def _settle_arithmetic(self) -> None:
        """Agrees with all workers in what convolutions are computed, and says so."""
        given, device = self.settings.resources.precision, self.group.device
        precision: Precision = "bf16" if all(self.group.gather(uses_bf16(device, given))) else "float32"
        if given == "auto" and self.group.rank == 0:
            self.run.note_precision(precision)
        self.settings = self.settings.with_precision(precision)
        network = self.settings.network
        obstacle = use_kernels(device, network.shape, network.input_size, precision)
        line = {"kind": "arithmetic", "device": str(device), "convolutions": precision, "obstacle": obstacle}
        self.tools.log(line)

    def _train(self, index: int, done: int, record: RoundRecord) -> None:
        """Steps of one phase, from step `done` of it on."""
        phase, learner = self.phases[index], self.learner
        take = self._step_of(phase, record)
        learner.network.train()
        meter = Meter(phase, self.group.world)
        stream = self.stream(phase, done, record) if done < phase.steps else iter(())
        for step in range(done, phase.steps):
            global_step = phase.first_step + step
            self.tools.at(f"waiting for the images of step {global_step}")
            with meter.waiting():
                batch = next(stream).to(self.group.device)
            self.tools.at(f"in step {global_step}")
            seed = derived_seed(self.settings.seed, STEP_SEED, self.group.rank, global_step)
            rate = learning_rate(self.settings, phase, step)
            learner.update.set_rate(rate)
            seen = take(batch, seed)
            self.skips.add(global_step, batch.keys, seen.pop("finite"))
            meter.add(seen)
            last = step + 1 == phase.steps
            unwell, looks = False, (step + 1) % LOG_STEPS == 0 or last
            if looks:
                line = meter.line(global_step + 1, step + 1, self._weights_metrics()) | {"learning_rate": rate}
                self.tools.log(line)
                unwell = self._unwell(line, phase.stage_step + step + 1)
            asks = (global_step + 1) % LOG_STEPS == 0
            stop = Unwell if unwell else self._stop_asked() if asks else None
            if looks or stop or self._has_its_step(step + 1):
                self.skips.look()
            if last or stop:
                self._checkpoint(index, step + 1)
                self.group.wait()
            elif self._has_its_step(step + 1) or (looks and self._has_its_time()):
                self._checkpoint(index, step + 1, beside=True)
            if stop:
                if stop is Leaving:
                    self.tools.log({"kind": "leaving", "step": global_step + 1})
                raise stop
        reasons = {key: why for each in self.group.gather(self.undecodable.reasons) for key, why in each.items()}
        if reasons:
            self.tools.log({"kind": "undecodable", "samples": reasons})

    def _step_of(self, phase: Phase, record: RoundRecord) -> Callable[[Batch, int], dict[str, Tensor]]:
        """What takes a step of a phase on a batch, with a seed: losses, gradient's norm, and whether it is finite.

        Alone on a GPU it is recorded and replayed; what workers send each other is not.
        """
        learner, group, losses_of = self.learner, self.group, self._losses_of(phase, record)
        step = training_step(learner.network, learner.update, losses_of, group.total, group.world)
        alone_on_gpu = group.device.type == "cuda" and group.world == 1
        return seeded(step, list(learner.network.parameters()), alone_on_gpu, self._not_recorded)

    def _not_recorded(self, obstacle: str) -> None:
        """Says that steps are launched one kernel at a time."""
        self.tools.log({"kind": "not_recorded", "obstacle": obstacle})

    def _losses_of(self, phase: Phase, record: RoundRecord) -> Callable[[Batch, torch.Generator], Losses]:
        """What a step of a phase computes of a batch and a generator."""
        device, wrapped = self.group.device, self.learner.wrapped
        partner = None if record.partner is None else torch.tensor(record.partner, device=device)
        if phase.stage == 1:
            points = record.kind == "keypoints" and self.settings.stage1.warmup_classes == "points"
            one = self.settings.stage1_step(points)
            return lambda batch, generator: stage1_losses(wrapped, batch, one, generator, partner)
        active, two = torch.tensor(record.active, device=device), self.settings.stage2_step()
        return lambda batch, generator: stage2_losses(wrapped, batch, active, two, generator, partner)

    def _stop_asked(self) -> type[Stopped] | None:
        """Why the run is to end here, if it is; all workers answer alike."""
        now = time.monotonic()
        asks = self.group.rank == 0 and now - self._asked >= ASK_SECONDS
        self._asked = now if asks else self._asked
        stop, asks = self.group.gather((asks and self.tools.stop(), asks))[0]
        return Stopped if stop else Leaving if asks and self.tools.leaving() else None

    def _has_its_step(self, phase_step: int) -> bool:
        """Whether a checkpoint is asked for after so many steps of a phase."""
        every = self.settings.resources.checkpoint_steps
        return every is not None and phase_step % every == 0

    def _has_its_time(self) -> bool:
        """Whether it is time for a checkpoint; only the worker that writes it knows."""
        return self.settings.resources.checkpoint_steps is None and self.group.rank == 0 and self.checkpoints.due()

    def _weights_metrics(self) -> dict[str, Tensor]:
        """What the weights and their gradients tell of the run's health; scalars on the device."""
        return {"decay_share": self.learner.update.decay_share(), "dead_scales": dead_scales(self.learner.network)}

    def _unwell(self, line: dict[str, Any] | None, stage_step: int = 0) -> bool:
        """Warns of signs that the run comes to nothing; whether it is to end for them, on which all workers agree."""
        found = self.watch.look(line, stage_step) if line is not None and self.group.rank == 0 else []
        for each in found:
            self.tools.log(each.line())
        stops = self.settings.resources.stop_when_unwell
        return stops and any(self.group.gather(any(each.sign.ends for each in found)))

    def stream(self, phase: Phase, done: int, record: RoundRecord) -> Iterator[Batch]:
        """This worker's batches of a phase, from step `done` of it on."""
        examples = training_examples(
            self.corpus.url,
            self.corpus.manifest,
            lambda shard: self.run.labels(record, shard),
            phase.min_labels,
            self.group.rank,
            self.group.world,
            # Two phases on the labels of one round do not exist, so the round tells them apart.
            derived_seed(self.settings.seed, DATA_SEED, phase.round) % 2**32,
        )
        share, view = self.group.share_of(phase.batch), self.settings.network.input_size
        return batches(examples, share, view, skip=done, bad=self.undecodable)

    def _restore(self) -> tuple[int, int]:
        """Builds network and optimizer as they were; returns phase index and steps done in it."""
        torch.manual_seed(derived_seed(self.settings.seed, WEIGHT_SEED))
        found, one = latest_checkpoint(self.run.checkpoints_url), self.settings.stage1
        self._begin_stage(DetectorDescriptor(self.settings.network.shape, one.detector_objective == "focal"))
        if found is None:
            return 0, 0
        record, tensors = found
        if record.settings != self._settings_hash:
            raise ValueError(f"{self.run.checkpoints_url} belongs to other settings; take another --name for these")
        if record.stage == 2:
            self._start_stage2(self.run.record(self.phases[record.phase].round))
        self.learner.network.load_state_dict(tensors["model.safetensors"])
        self.learner.update.restore(tensors["optimizer.safetensors"])
        self.tools.log({"kind": "resume", "step": record.step})
        return record.phase, record.phase_step

    def _start_stage2(self, record: RoundRecord) -> None:
        """Puts the landmark head on what stage 1 has learnt.

        Raises:
            ValueError: if no cluster has labels enough to become a landmark.
        """
        if not any(record.active):
            raise ValueError(
                f"no cluster has more than {self.settings.stage2.min_population} labels (the largest has "
                f"{max(record.population)}), so there is nothing to learn landmarks from; lower "
                "--stage2.min-population, or take fewer clusters (--cluster.clusters) or more images"
            )
        torch.manual_seed(derived_seed(self.settings.seed, WEIGHT_SEED, 2))
        learnt = cast(DetectorDescriptor, self.learner.network).cpu()
        probabilities = self.settings.stage2.objective == "focal"
        self._begin_stage(LandmarkDetector.from_stage1(learnt, len(record.active), probabilities))

    def _begin_stage(self, network: DetectorDescriptor | LandmarkDetector) -> None:
        """Puts a stage's network on the device, with its optimizer."""
        stage = self.settings.stage1 if isinstance(network, DetectorDescriptor) else self.settings.stage2
        network = laid_out(network, self.group.device)
        update = Update(network, stage.learning_rate, stage.weight_decay, stage.optimizer)
        wrapped = self.group.wrap(network)
        self.learner = Learner(network, wrapped, update)

    @property
    def _settings_hash(self) -> str:
        """sha256 of what the result depends on."""
        return storage.sha256(self.settings.method_json().encode())

    def _checkpoint(self, index: int, phase_step: int, beside: bool = False) -> None:
        """The first worker writes a checkpoint, and goes on meanwhile if it may."""
        phase = self.phases[index]
        if self.group.rank == 0:
            self.checkpoints.write(
                self.learner.network,
                self.learner.update.state(),
                beside=beside,
                step=phase.first_step + phase_step,
                phase=index,
                phase_step=phase_step,
                stage=phase.stage,
                settings=self._settings_hash,
            )


def out_of_memory(settings: TrainSettings, stage: int) -> str:
    """What to say when a GPU's memory is full: what was asked for, what there is, and what to try."""
    name, size = ("stage1.pairs", settings.stage1.pairs) if stage == 1 else ("stage2.batch", settings.stage2.batch)
    workers = settings.resources.min_workers
    minimum = 2 * workers if stage == 1 else workers
    smaller = max(minimum, size // 2 // workers * workers)
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
