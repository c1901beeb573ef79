"""The presets: named settings, each with one line that says what it is for."""

from dataclasses import replace

from sst.config import (
    ClusterSettings,
    KeypointSettings,
    NetworkSettings,
    Stage1Settings,
    Stage2Settings,
    TrainSettings,
)
from sst.nn.augment import STRONGER, Augmentation

SMALL = NetworkSettings(input_size=96, width=64, depth=3, groups=8, descriptor_size=64)
"""Small enough for CPU cores."""

OURS_1 = Stage1Settings(
    weight_decay=0.0,
    min_labels=4,
    detector_target="bump",
    detector_weight=2.0,
    threshold=0.15,
    unite=False,
    augmentation=Augmentation(about="view"),
)
"""Stage 1 as our own presets have it, beside lengths: labels are what the detector finds now, so that a wrong one does
not live on."""

OURS_2 = Stage2Settings(
    objective="focal",
    optimizer="adamw",
    learning_rate=1e-3,
    batch=16,
    milestones=(),
    weight_decay=1e-4,
    merge_after=0,
    merge_share=0.5,
    occlude_share=0.3,
    refine_rounds=10,
    refine_iterations=150,
    visible=0.5,
    augmentation=replace(STRONGER, about="view"),
)
"""Stage 2 as our own presets have it: a focal loss learns in hundreds of steps, then landmarks refine themselves. Above
a confidence of 0.5 a landmark is visible more likely than not."""

PRESETS: dict[str, tuple[str, TrainSettings]] = {
    "celeba": ("CelebA faces, published schedule", TrainSettings()),
    "ls3d": ("300W-LP and LS3D-W faces, published schedule", TrainSettings()),
    "human36m": (
        "Human3.6M bodies, published schedule, 250 clusters",
        TrainSettings(
            keypoints=KeypointSettings(remove_background=True),
            cluster=ClusterSettings(clusters=250),
        ),
    ),
    "faces-cpu": (
        "any faces on 2 CPU cores in a quarter of an hour: 96 px input, a network of 0.35 M parameters, 30 landmarks",
        TrainSettings(
            network=SMALL,
            keypoints=KeypointSettings(outlier_reference=10_000, outlier_neighbours=7),
            cluster=ClusterSettings(clusters=45, sample=100_000),
            stage1=OURS_1.changed(warmup_iterations=500, rounds=4, round_iterations=200),
            stage2=OURS_2.changed(iterations=600, refine_rounds=10, min_population=195, max_landmarks=30),
        ),
    ),
    "faces-gpu": (
        "any faces on one GPU in a quarter of an hour: the published network at 256 px, 30 landmarks",
        TrainSettings(
            keypoints=KeypointSettings(outlier_reference=10_000, outlier_neighbours=7),
            cluster=ClusterSettings(clusters=45),
            stage1=OURS_1.changed(warmup_iterations=2_000, rounds=4, round_iterations=800),
            stage2=OURS_2.changed(
                iterations=1_000,
                batch=32,
                refine_rounds=12,
                refine_iterations=300,
                min_population=195,
                max_landmarks=30,
            ),
        ),
    ),
    "toy-cpu": (
        "the embedded corpus on 2 CPU cores in six to ten minutes",
        TrainSettings(
            network=SMALL,
            keypoints=KeypointSettings(outlier_share=0.1, outlier_reference=5_000, outlier_neighbours=7),
            cluster=ClusterSettings(clusters=48, sample=50_000),
            stage1=OURS_1.changed(warmup_iterations=300, rounds=2, round_iterations=120),
            stage2=OURS_2.changed(iterations=200, refine_rounds=4, min_population=60, max_landmarks=24),
        ),
    ),
    "bbcpose": ("BBC Pose signers: the settings of celeba, as nothing was published for them", TrainSettings()),
}
"""Name: what it is for, and its settings."""
