"""All settings of a run, in one typed tree.

Every model is frozen and refuses unknown keys. Defaults are the published values (Mallis et al. 2020, section 4
and supplementary material; CelebA); a preset states only what differs.
"""

from typing import Annotated, Any, Literal, Self

import tyro
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from cluster.kmeans import KMeansSettings
from sst.nn.augment import Augmentation
from sst.nn.geometry import STRIDE
from sst.nn.losses import Contrast, DetectorTarget, Objective
from sst.nn.network import NetworkShape
from sst.nn.optimizer import OptimizerName
from sst.nn.precision import Precision
from sst.nn.steps import Stage1Step, Stage2Step

Positive = Annotated[int, Field(gt=0)]
Channels = Annotated[int, Field(gt=0, le=4096)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(gt=0.0)]


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def changed(self, **values: Any) -> Self:
        """The same with other values, which are checked as in any settings.

        Raises:
            ValueError: if a name is unknown or a value not permitted.
        """
        return type(self).model_validate({name: getattr(self, name) for name in type(self).model_fields} | values)


class NetworkSettings(Settings):
    """Size of network and input."""

    input_size: Channels = 256
    """Side of the square network input, in pixels."""
    width: Channels = 256
    """Channels of the hourglass."""
    depth: Annotated[int, Field(gt=0, le=8)] = 4
    """Levels of the hourglass."""
    groups: Channels = 32
    """Groups of every GroupNorm."""
    descriptor_size: Channels = 256
    """Channels of the descriptor head."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        step = STRIDE * 2**self.depth
        if self.input_size % step:
            raise ValueError(f"input_size {self.input_size} must be a multiple of 4 * 2**depth = {step}")
        if self.width % (8 * self.groups):
            raise ValueError(f"width {self.width} must be a multiple of 8 * groups = {8 * self.groups}")
        return self

    @property
    def shape(self) -> NetworkShape:
        """What the network itself needs to know."""
        return NetworkShape(self.width, self.depth, self.groups, self.descriptor_size)


class SuperPointSettings(Settings):
    """SuperPoint as the detector of first keypoints; published values."""

    weights: Annotated[str | None, tyro.conf.arg(name="superpoint-weights", prefix_name=False)] = None
    """File or URL of superpoint_v1.pth, which users get from its authors (non-commercial licence)."""
    threshold: Share = 0.1
    """Confidence above which a pixel is a keypoint."""
    scales: tuple[float, ...] = (1.0, 1.3, 1.6)
    """Magnifications of the image in which keypoints are sought; descriptors come from the first, which is 1."""
    nms_radius: Rate = 6.0
    """Half side, in pixels, of the squares around keypoints that must not overlap."""


class FeatureSettings(Settings):
    """A network of others as the source of first keypoints."""

    model: Annotated[str | None, tyro.conf.arg(name="features-model", prefix_name=False)] = None
    """For transformers: folder, or id on the hub, from where the library fetches it, such as facebook/dinov2-small. For
    export: file or URL of a program of torch.export, which is code: take only files that you trust."""
    side: Positive = 448
    """Side, in pixels, at which a model of transformers sees the view: more is finer and slower. For models that divide
    it into patches, a multiple of their size."""


class KeypointSettings(Settings):
    """First keypoints (stage 0)."""

    detector: Annotated[
        Literal["rootsift", "superpoint", "transformers", "export"],
        tyro.conf.arg(name="keypoints", prefix_name=False),
    ] = "rootsift"
    """Upright RootSIFT needs no download; superpoint is the published choice and needs a file of weights; transformers
    takes a model of Hugging Face (extra `features`), and export a program of torch.export, each by `--features-model`.
    Where these have features but no keypoints, the features are read at SIFT's points."""
    superpoint: SuperPointSettings = SuperPointSettings()
    features: FeatureSettings = FeatureSettings()
    patch: Rate = 28.0
    """Size of the upright RootSIFT descriptor, in pixels of a 256 px view."""
    max_num_keypoints: Positive = 60
    """At most this many keypoints per image, strongest first."""
    outlier_share: Share = 0.4
    """Share of keypoints dropped as outliers, the most isolated descriptors first."""
    outlier_neighbours: Positive = 100
    """Neighbours among the reference descriptors whose median distance is a keypoint's outlier score."""
    outlier_reference: Positive = 500_000
    """Descriptors, drawn over the whole corpus, among which neighbours are searched."""
    remove_background: bool = False
    """Drop keypoints that look like what lies outside the object boxes; for constant backgrounds."""
    inside_clusters: Positive = 100
    """Clusters of the descriptors inside the boxes, for background removal."""
    outside_clusters: Positive = 250
    """Clusters of the descriptors outside the boxes, for background removal."""


class ClusterSettings(Settings):
    """k-means and correspondence."""

    clusters: Annotated[int, Field(ge=2, le=32_000)] = 100
    """Number of clusters K."""
    iterations: Positive = 100
    """k-means iterations at most."""
    sample: Positive = 500_000
    """Descriptors that k-means trains on, drawn evenly over all shards."""
    backend: Literal["auto", "cuml", "torch"] = "auto"
    """cuml needs a GPU; torch runs anywhere; auto takes cuml where a GPU is, and says which it took."""
    actors: Positive = 1
    """Actors that share the sample of k-means, for samples past one GPU: over NCCL, or on CPUs by sums of each."""
    keep_identities: bool = True
    """Carry cluster numbers over from round to round, by matching clusters on the labels that they share."""

    def kmeans(self, seed: int) -> KMeansSettings:
        """Settings of a fit."""
        return KMeansSettings(self.clusters, self.iterations, seed=seed, backend=self.backend)


class Stage1Settings(Settings):
    """Detector and descriptor, alternating with correspondence."""

    warmup_iterations: Count = 20_000
    """Optimizer steps on the first labels; 0 skips stage 1 altogether."""
    rounds: Count = 29
    """Rounds of training after the warm-up, each on the labels of a new correspondence. One more correspondence gives
    stage 2 its labels, which makes the 30 that were published."""
    round_iterations: Positive = 10_000
    """Optimizer steps of a round: one cosine cycle. The warm-up keeps `learning_rate`."""
    pairs: Positive = 16
    """Pairs of views per step, over all workers."""
    learning_rate: Rate = 5e-4
    """Start of each cosine cycle."""
    optimizer: OptimizerName = "rmsprop"
    """rmsprop as published, or adamw."""
    floor_learning_rate: Rate = 5e-6
    """What each cosine cycle falls towards; the next one begins before it gets there."""
    cosine_steps: Positive = 5
    """Steps in which the rate falls during a cycle."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-5
    """Added to the gradient, as published: where it outweighs a gradient, RMSprop makes full steps of it, and weights
    vanish. Our own presets have none."""
    min_labels: Count = 9
    """Images with fewer labelled points are not used."""
    different_share: Share = Stage1Step.different_share
    """Share of pairs whose views come from two different images."""
    warmup_classes: Literal["clusters", "points"] = "clusters"
    """What has one descriptor in the warm-up: points of one cluster in all images (published), or each point alone, in
    two random views of its image."""
    flip_share: Share = Stage1Step.flip_share
    """Share of the images of a round that are mirrored, their labels given to the mirrored clusters, which every
    correspondence finds; for objects with a plane of symmetry whose left and right the landmarks confuse."""
    contrast: Contrast = Stage1Step.contrast
    """How descriptors are drawn together and apart: margin for distances of pairs (published), softmax for a normalised
    contrast over the batch."""
    margin: Rate = Stage1Step.margin
    """Descriptors of different clusters are pushed this far apart."""
    temperature: Rate = Stage1Step.temperature
    """Of the softmax contrast: small ones attend to the hardest points."""
    descriptor_weight: Rate = Stage1Step.descriptor_weight
    """Weight of the descriptor loss."""
    detector_weight: Rate = Stage1Step.detector_weight
    """Weight of the detector loss."""
    detector_target: DetectorTarget = Stage1Step.detector_target
    """What the detector learns to draw at a label: a single cell (published), or the bump of stage 2, which a short
    schedule learns sooner."""
    detector_objective: Objective = Stage1Step.detector_objective
    """How the detector's heatmap is compared with that: squared error (published), or focal."""
    threshold: Share = 0.2
    """Detector confidence above which a keypoint is taken in a round."""
    unite: bool = True
    """Take the previous labels into each round beside what the detector finds, and before it (published). Else an
    image in which it finds fewer than `min_labels` keypoints is labelled at its first ones too."""
    augmentation: Augmentation = Stage1Step.augmentation
    """Random changes of each view."""


class Stage2Settings(Settings):
    """The landmark detector."""

    iterations: Positive = 80_000
    """Optimizer steps."""
    batch: Positive = 64
    """Images per step, over all workers."""
    objective: Objective = Stage2Step.objective
    """How heatmaps are compared with their targets: squared error (published), or focal, which learns ten times sooner
    and makes confidences probabilities."""
    optimizer: OptimizerName = "rmsprop"
    """rmsprop as published, or adamw."""
    learning_rate: Rate = 5e-4
    """At the start; a tenth after each milestone."""
    milestones: tuple[Count, ...] = (50_000, 65_000)
    """Steps after which the learning rate falls to a tenth."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-5
    """Added to the gradient, as published: where it outweighs a gradient, RMSprop makes full steps of it, and weights
    vanish. Our own presets have none."""
    min_population: Count = 500
    """Clusters with this many labelled points or fewer are inactive."""
    merge_after: Count = 25_000
    """Step of the first merging of clusters that name the same place."""
    merge_every_epochs: Positive = 2
    """Passes over the training images between two mergings."""
    merge_every: Positive | None = None
    """Steps between two mergings, instead of epochs; for short schedules."""
    merge_share: Share = 0.7
    """Two channels are one place where they coincide in more than this share of the less populated one's images."""
    merge_radius: Rate = 5.7
    """Within this distance, in pixels of a 256 px view, two landmarks coincide."""
    merge_confidence: Share = 0.2
    """Confidence from which a landmark is counted when channels are compared for merging."""
    refine_rounds: Count = 0
    """Rounds at the end in which the landmarks refine themselves: the network is trained on its own answers, where they
    agree on an image and a warped copy (beyond the paper)."""
    refine_iterations: Positive = 200
    """Optimizer steps of such a round."""
    refine_confidence: Share = 0.4
    """Confidence from which an answer may become a label."""
    refine_radius: Rate = 6.0
    """Pixels of a 256 px view within which the answers on an image and on its warped copy must agree."""
    visible: Share = 0.2
    """Confidence from which a landmark counts as visible at inference."""
    flip_share: Share = Stage2Step.flip_share
    """Share of the images that are mirrored, once a merging has found which landmarks are left/right pairs; for objects
    with a plane of symmetry whose left and right the landmarks confuse."""
    occlude_share: Share = Stage2Step.occlude_share
    """Share of the images of which a rectangle is covered by part of another image, so that a landmark learns to answer
    nothing where it is hidden."""
    max_landmarks: Positive | None = None
    """At most so many landmarks are kept: those found again most often after a random warp, spread over the object."""
    augmentation: Augmentation = Stage2Step.augmentation
    """Random changes of each image."""


class ResourceSettings(Settings):
    """What a run takes of its machine or cluster."""

    workers: Annotated[
        str,
        BeforeValidator(str),
        Field(pattern=r"^(auto|[1-9]\d{0,4}(:[1-9]\d{0,4})?)$"),
        tyro.conf.arg(aliases=("--workers",), metavar="auto|N|LEAST:MOST"),
    ] = "auto"
    """DDP workers: auto for one on each GPU of the cluster or, without GPUs, on each CPU core, up to 8, for which there
    is memory; 8; or 2:8 for as many of these as the cluster has room for, which may change during the run."""
    worker_cpus: Rate = 0.9
    """CPUs that Ray sets aside per worker; the rest is left to the tasks of a round."""
    worker_gpus: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """GPUs per worker, where the cluster has any; the rest is left to the k-means actor."""
    kmeans_gpus: Share = 0.1
    """GPUs of the k-means actor, where the cluster has any."""
    gpu: bool | None = None
    """Train on GPUs; unset: where the cluster has any. True also waits for those that a cluster brings when asked."""
    precision: Precision = "auto"
    """Arithmetic of convolutions; weights, losses and optimizer are always float32. auto: bf16 where all workers have
    matrix units for it (recent GPUs, some server CPUs), float32 elsewhere; a run keeps what it began with."""
    max_failures: Count = 3
    """Lost workers that a run survives before it gives up; submit it again to go on."""
    checkpoint_steps: Positive | None = None
    """Optimizer steps between two checkpoints inside a phase; unset: 30 seconds or more, so that they hold training up
    for 1 % of the time at most."""
    hang_minutes: Rate = 20.0
    """Minutes in which no worker gets any further after which all are started again from the last checkpoint. A k-means
    or a pass over shards that gives nothing for half as long is begun again."""
    stop_when_unwell: Annotated[bool, tyro.conf.arg(aliases=("--stop-when-unwell",))] = False
    """End the run after a checkpoint, with exit code 4, at a sign that it comes to nothing, not only warn. The
    same command without this goes on."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ValueError(f"workers {self.workers}: the least come first, as in 2:8")
        return self

    @property
    def patience(self) -> float:
        """Seconds after which a k-means, or a pass over shards, that gives nothing is begun again."""
        return 30 * self.hang_minutes

    @property
    def min_workers(self) -> int:
        """Workers without which nothing begins; 1 as long as it is not settled what auto is (`sst.run.placement`)."""
        return 1 if self.workers == "auto" else int(self.workers.partition(":")[0])

    @property
    def max_workers(self) -> int:
        """Workers at most; the same where their number is fixed, and 1 as long as auto is not settled."""
        return 1 if self.workers == "auto" else int(self.workers.rpartition(":")[2])


SAFE_TO_CHANGE = tuple(name for name in ResourceSettings.model_fields if name != "precision")
"""Resources with which a run may go on that began with others. On CPUs, with as many workers as before, it goes
on bit for bit; with another number of workers the images come in another order."""


class TrainSettings(Settings):
    """One run: method and resources. Where it lies and what it reads is given beside it."""

    seed: Count = 0
    """All randomness of the run derives from it."""
    network: NetworkSettings = NetworkSettings()
    keypoints: KeypointSettings = KeypointSettings()
    cluster: ClusterSettings = ClusterSettings()
    stage1: Stage1Settings = Stage1Settings()
    stage2: Stage2Settings = Stage2Settings()
    resources: ResourceSettings = ResourceSettings()

    def stage1_step(self, own_classes: bool = False) -> Stage1Step:
        """What a step of stage 1 needs to know."""
        one = self.stage1
        return Stage1Step(
            input_size=self.network.input_size,
            precision=self.resources.precision,
            different_share=one.different_share,
            own_classes=own_classes,
            contrast=one.contrast,
            margin=one.margin,
            temperature=one.temperature,
            flip_share=one.flip_share,
            descriptor_weight=one.descriptor_weight,
            detector_weight=one.detector_weight,
            detector_target=one.detector_target,
            detector_objective=one.detector_objective,
            augmentation=one.augmentation,
        )

    def stage2_step(self) -> Stage2Step:
        """What a step of stage 2 needs to know."""
        return Stage2Step(
            input_size=self.network.input_size,
            precision=self.resources.precision,
            objective=self.stage2.objective,
            flip_share=self.stage2.flip_share,
            occlude_share=self.stage2.occlude_share,
            augmentation=self.stage2.augmentation,
        )

    def method_json(self) -> str:
        """What the result depends on, as text: without resources and without defaults.

        A later version may add a setting, whose default changes nothing; so defaults are left out. Of the resources
        only the precision matters, which settings.json records.
        """
        return self.model_dump_json(exclude_defaults=True, exclude={"resources"})

    def with_precision(self, precision: Precision) -> Self:
        """The same with another arithmetic."""
        return self.changed(resources=self.resources.changed(precision=precision))

    def with_workers(self, workers: str) -> Self:
        """The same with another number of workers, for which the batches must do.

        Raises:
            ValueError: if a batch is too small for so many.
        """
        return self.changed(resources=self.resources.changed(workers=workers))

    @property
    def workers_for_batch(self) -> int:
        """Workers at most for which the batches do: 2 pairs each in stage 1, an image each in stage 2."""
        pairs = self.stage1.pairs // 2 if self.stage1.warmup_iterations else self.stage2.batch
        return min(pairs, self.stage2.batch)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        workers = self.resources.max_workers
        if self.stage2.batch < workers:
            raise ValueError(
                f"stage2.batch {self.stage2.batch} must be at least 1 per worker, and there may be {workers}"
            )
        if self.stage1.rounds and not self.stage1.warmup_iterations:
            raise ValueError(
                "stage1.rounds needs stage1.warmup_iterations above 0: untrained descriptors cannot be clustered"
            )
        if self.stage1.warmup_iterations and self.stage1.pairs < 2 * workers:
            raise ValueError(
                f"stage1.pairs {self.stage1.pairs} must be at least 2 per worker, and there may be {workers}: a pair's "
                "second image is another one of the batch"
            )
        return self


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """Fields in which two nested settings differ, as "path: before -> after"."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(before.keys() | after.keys())
        return [d for k in keys for d in differences(before.get(k), after.get(k), f"{path}.{k}" if path else k)]
    return [] if before == after else [f"{path}: {before} -> {after}"]
