"""What a run does when: its phases, learning rates and seeds, all pure functions of the settings."""

import math
from dataclasses import dataclass

import numpy as np

from sst.config import TrainSettings


@dataclass(frozen=True)
class Phase:
    """Some optimizer steps on the labels of one round.

    Attributes:
        name: as shown to people.
        stage: 1 or 2.
        round: number of the round whose labels are trained on.
        first_step: steps of the run before it.
        steps: its length.
        stage_step: steps of its stage before it.
        batch: pairs (stage 1) or images (stage 2) of a step over all workers.
        min_labels: images with fewer labels are not used.
        refines: whether its labels are the landmark network's own answers.
    """

    name: str
    stage: int
    round: int
    first_step: int
    steps: int
    stage_step: int
    batch: int
    min_labels: int
    refines: bool = False

    @property
    def views(self) -> int:
        """Images that pass through the network in a step, over all workers: both views of each pair in stage 1."""
        return 2 * self.batch if self.stage == 1 else self.batch


def plan(settings: TrainSettings, images: int) -> list[Phase]:
    """The run's phases: warm-up, rounds, stage 2 cut at its mergings, and its refinements."""
    one, two = settings.stage1, settings.stage2
    lengths = [("warm-up", 1, one.warmup_iterations)] if one.warmup_iterations else []
    lengths += [(f"round {number}", 1, one.round_iterations) for number in range(1, one.rounds + 1)]
    every = two.merge_every or max(1, two.merge_every_epochs * math.ceil(images / two.batch))
    cuts = [0, *range(two.merge_after, two.iterations, every), two.iterations] if two.merge_after else []
    cuts = sorted(set(cuts or [0, two.iterations]))
    cuts = [cut for cut in cuts if cut <= two.iterations]
    lengths += [("landmarks", 2, after - before) for before, after in zip(cuts[:-1], cuts[1:], strict=True)]
    lengths += [(f"refine {number}", 2, two.refine_iterations) for number in range(1, two.refine_rounds + 1)]
    first_refinement = len(lengths) - two.refine_rounds
    phases: list[Phase] = []
    for name, stage, steps in lengths:
        first = phases[-1].first_step + phases[-1].steps if phases else 0
        before = sum(phase.steps for phase in phases if phase.stage == stage)
        batch, minimum = (one.pairs, one.min_labels) if stage == 1 else (two.batch, 1)
        number = len(phases)
        phases.append(Phase(name, stage, number, first, steps, before, batch, minimum, number >= first_refinement))
    return phases


def learning_rate(settings: TrainSettings, phase: Phase, step: int) -> float:
    """Learning rate of a phase's step.

    Stage 1: constant in the warm-up; each round is cut into `cosine_steps` equal parts, at whose beginnings the rate
    falls along a cosine that would reach its floor where the next round begins. Stage 2: a tenth after each
    milestone. Source: Mallis et al. 2020, section 4, and its published code. Without milestones (beyond the paper) the
    rate of stage 2 falls to nothing along a cosine in every phase, so that the next labels come from settled weights.
    """
    if phase.stage == 2 and not settings.stage2.milestones:
        return settings.stage2.learning_rate * 0.5 * (1 + math.cos(math.pi * step / phase.steps))
    if phase.stage == 2:
        passed = sum(phase.stage_step + step >= milestone for milestone in settings.stage2.milestones)
        return settings.stage2.learning_rate * 0.1**passed
    one = settings.stage1
    if phase.stage_step < one.warmup_iterations:
        return one.learning_rate
    share = (step * one.cosine_steps // phase.steps) / one.cosine_steps
    swing = one.learning_rate - one.floor_learning_rate
    return one.floor_learning_rate + 0.5 * swing * (1 + math.cos(math.pi * share))


def derived_seed(*parts: int) -> int:
    """A seed that is a function of run seed, purpose, rank and step, and of nothing else."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
