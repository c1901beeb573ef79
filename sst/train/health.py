"""Whether a run is well: metrics by which one that comes to nothing is known at once, each with a limit and its reason.

Pure functions of lines of metrics, and `Watch`, which remembers for how many lines a sign has held.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sst.config import TrainSettings

DEAD_SCALE = 0.01
"""A normalisation whose scale is smaller than this has all but switched its channel off; scales begin at 1."""

SETTLED_STEPS = 400
"""Steps of a stage before its metrics are judged: a fresh head first falls from far above the all-zero level to it."""

LINES_IN_A_ROW = 5
"""Lines of metrics, of 20 steps each, for which a sign of a step must hold: single ones are noise."""


@dataclass(frozen=True)
class Sign:
    """A metric by which something is known to be wrong.

    Attributes:
        name: of the sign.
        metric: of a line of metrics.
        limit: from which the metric is a sign.
        below: whether it is one below the limit, not above it.
        why: the reason for the limit.
        means: what is seen there, in words; the metric stands in it as {0}, as a number or a percentage.
        cause: what usually leads to it.
        remedy: what to do.
        stages: whose steps are judged; none for rounds of correspondence.
        at_end: judged at the end of a phase alone.
        any_time: judged from a stage's first step on.
        ends: whether `--stop-when-unwell` ends the run for it.
    """

    name: str
    metric: str
    limit: float
    below: bool
    why: str
    means: str
    cause: str
    remedy: str
    stages: tuple[int, ...] = ()
    at_end: bool = False
    any_time: bool = False
    ends: bool = True

    def holds(self, line: Mapping[str, Any]) -> bool:
        """Whether a line's metric is beyond the limit; a line without it, or with NaN, says nothing."""
        value = line.get(self.metric)
        return value is not None and (value < self.limit if self.below else value > self.limit)

    def judges(self, line: Mapping[str, Any], stage_step: int) -> bool:
        """Whether a line is one that the sign is looked for in."""
        if line["kind"] == "round":
            return not self.stages
        if line["kind"] != "step" or line["stage"] not in self.stages:
            return False
        if self.at_end:
            return bool(line["phase_step"] == line["phase_steps"])
        return self.any_time or stage_step >= SETTLED_STEPS

    @property
    def lines(self) -> int:
        """For how many lines in a row it must hold."""
        return LINES_IN_A_ROW if self.stages and not self.at_end else 1


SIGNS = (
    Sign(
        "labels lost",
        "labels_kept",
        0.5,
        True,
        "sound rounds keep 0.7 to 1.4 of the most so far, and over 0.55 in the long run; ones that collapsed kept "
        "0.31 and 0.36 in their second round",
        "labels per image are {0:.0%} of what they were",
        "most clusters have died, or the detector has lost its points",
        "lower --stage1.learning-rate or --stage1.threshold, or lengthen rounds (--stage1.round-iterations)",
    ),
    Sign(
        "clusters died",
        "clusters_kept",
        0.5,
        True,
        "sound rounds use all clusters or nearly all; ones that collapsed used 9 of 40 and 12 of 100",
        "clusters in use are {0:.0%} of what they were",
        "descriptors have all become alike or have turned as a whole, so that k-means left most clusters empty",
        "lower --stage1.learning-rate, lengthen rounds (--stage1.round-iterations), or take fewer clusters "
        "(--cluster.clusters)",
    ),
    Sign(
        "labels do not last",
        "label_persistence",
        0.05,
        True,
        "random numbers of 20 or more clusters would keep less than this; sound rounds keep 0.3 to 0.9",
        "only {0:.0%} of the labels of the round before were found again",
        "clusters change their identity or points their place from round to round, so nothing builds up",
        "lengthen rounds (--stage1.round-iterations), or lower --stage1.learning-rate",
    ),
    Sign(
        "few keypoints",
        "first_keypoints_share",
        0.5,
        False,
        "sound rounds find enough in nearly every image (stage1.min_labels); a detector that draws nothing, in none",
        "{0:.0%} of the images are labelled at their first keypoints, since the detector found hardly any there",
        "the detector has learnt to draw nothing, or has not learnt enough yet; such places get no better",
        "lengthen the warm-up (--stage1.warmup-iterations), raise --stage1.detector-weight, or lower "
        "--stage1.threshold",
    ),
    Sign(
        "landmarks set back",
        "set_back_share",
        0.5,
        False,
        "sound refinements set back none or one of thirty; half means that answers no longer follow the images",
        "{0:.0%} of the landmarks agreed with themselves in few of the images with a label, or slid off their labels",
        "the network answers places of the view, not of the object, or has not learnt enough to refine itself",
        "lengthen stage 2 (--stage2.iterations), or lower --stage2.learning-rate",
    ),
    Sign(
        "nothing detected",
        "peak",
        0.2,
        True,
        "the next round takes points above this only (stage1.threshold)",
        "the detector's highest point in an image is {0:.3f} on average, so the next round will find hardly any",
        "the detector has learnt to draw nothing, or has not learnt enough yet",
        "lengthen the phase (--stage1.warmup-iterations, --stage1.round-iterations), raise "
        "--stage1.detector-weight, take --stage1.detector-target bump, or lower --stage1.threshold",
        (1,),
        at_end=True,
    ),
    Sign(
        "nothing learnt",
        "loss_of_all_zero",
        0.99,
        False,
        "a network that draws nothing has 1.000, one that learns from noise more; a sound but narrow one on drawings "
        "lay within 1 % of it for its first 100 steps only, and at 0.92 after 400",
        "the loss is {0:.1%} of that of maps that are zero everywhere",
        "the landmark network answers nothing: labels that say nothing, a learning rate that is too high, or "
        "weight decay that outweighs the gradient and shrinks the weights",
        "look at the labels (rounds/ in MLflow); take --stage2.weight-decay 0, or lower --stage2.learning-rate",
        (2,),
    ),
    Sign(
        "flat landmarks",
        "peak",
        0.01,
        True,
        "a label's bump has height 1; what is known to a tenth of the view's side has 0.01 to 0.02",
        "the landmarks' maxima are {0:.4f} high on average",
        "the landmark network answers nothing: see the loss beside that of maps of zeros",
        "look at the labels (rounds/ in MLflow); take --stage2.weight-decay 0, or lower --stage2.learning-rate",
        (2,),
    ),
    Sign(
        "weights vanish",
        "decay_share",
        0.8,
        False,
        "sound steps with decay have 0.04 to 0.6, the published network just above the all-zero level 0.62; where more "
        "weights than that follow their decay alone, they are on their way to nothing",
        "weight decay outweighs the gradient in {0:.0%} of the weights",
        "the gradient is tiny, and RMSprop makes full steps of the decay that is added to it: weights shrink by "
        "the learning rate at every step",
        "take --stage1.weight-decay 0 and --stage2.weight-decay 0",
        (1, 2),
    ),
    Sign(
        "channels died",
        "dead_scales",
        0.1,
        False,
        "scales begin at 1, and sound runs have none below 0.01; a network that had unlearnt all had a quarter",
        "{0:.0%} of the normalisation's scales are below 0.01: their channels are switched off",
        "weight decay that outweighs the gradient, or a learning rate that is too high",
        "take --stage1.weight-decay 0 and --stage2.weight-decay 0, or lower the learning rates",
        (1, 2),
        any_time=True,
    ),
    Sign(
        "waiting for images",
        "waiting_share",
        0.2,
        False,
        "below a fifth, faster reading would gain little",
        "{0:.0%} of the time is spent waiting for images",
        "shards on a slow disk or a far bucket, or images far larger than needed",
        "copy the shards to a disk here, or pack with --size 256",
        (1, 2),
        ends=False,
    ),
)
"""All signs that are looked for."""


def signs(settings: TrainSettings) -> tuple[Sign, ...]:
    """The signs with their limits for a run: what counts as a detection is in its settings."""
    threshold = settings.stage1.threshold
    return tuple(replace(sign, limit=threshold) if sign.name == "nothing detected" else sign for sign in SIGNS)


@dataclass(frozen=True)
class Unwell:
    """A sign that holds, and where."""

    sign: Sign
    value: float
    where: str

    @property
    def text(self) -> str:
        """What is seen."""
        return f"{self.where}: {self.sign.means.format(self.value)}."

    @property
    def advice(self) -> str:
        """Why that may be, and what to do."""
        return f"Usual cause: {self.sign.cause}. Remedy: {self.sign.remedy}."

    def line(self) -> dict[str, Any]:
        """As a line of metrics."""
        said = {"sign": self.sign.name, "value": self.value, "text": self.text, "advice": self.advice}
        return {"kind": "health"} | said | {"ends": self.sign.ends}


def without_cuml(reason: str) -> dict[str, Any]:
    """A line of metrics that warns of k-means by torch beside a GPU that is there."""
    return {
        "kind": "health",
        "sign": "k-means without cuML",
        "text": f"k-means is computed by torch, since cuML cannot run beside a GPU that is there: {reason}.",
        "advice": "Results agree up to rounding, large samples take longer. Remedy: pip install -c constraints.txt -e "
        "'.[gpu]'; or take --cluster.backend torch, with which this is not said.",
        "ends": False,
    }


@dataclass
class Watch:
    """Looks at a run's lines of metrics, and tells of a sign once, when it has held for long enough."""

    signs: tuple[Sign, ...]
    held: dict[str, int] = field(default_factory=dict)

    def look(self, line: Mapping[str, Any], stage_step: int = 0) -> list[Unwell]:
        """The signs that hold since this line.

        Args:
            line: of metrics, of a step or a round.
            stage_step: for a step, how many its stage has had.
        """
        found = []
        for sign in self.signs:
            if not sign.judges(line, stage_step):
                continue
            self.held[sign.name] = self.held.get(sign.name, 0) + 1 if sign.holds(line) else 0
            if self.held[sign.name] == sign.lines:
                found.append(Unwell(sign, float(line[sign.metric]), place_of(line)))
        return found


def place_of(line: Mapping[str, Any]) -> str:
    """Where in the run a line is, as people say it."""
    return f"round {line['round']}" if line["kind"] == "round" else f"step {line['step']} ({line['phase']})"


def kept_shares(metrics: Mapping[str, float], before: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Labels and clusters of a round of correspondence against the most that earlier ones had.

    The most, not the last: a decline that spreads over several rounds is one as well.
    """
    earlier: Sequence[Mapping[str, float]] = list(before)
    shares = {}
    for name, metric in (("labels_kept", "labels_per_image"), ("clusters_kept", "clusters_in_use")):
        maximum = max((each[metric] for each in earlier), default=0)
        if maximum:
            shares[name] = metrics[metric] / maximum
    return shares


@torch.no_grad()
def dead_scales(network: nn.Module) -> Tensor:
    """Share of the scales of a network's group normalisations that are below `DEAD_SCALE`; a scalar on its device."""
    scales: list[Tensor] = [module.weight for module in network.modules() if isinstance(module, nn.GroupNorm)]
    return (torch.cat(scales).abs() < DEAD_SCALE).float().mean()
