"""The presets: named settings, each with one line that says what it is for."""

from dataclasses import replace

from sst.config import (
    ClusterSettings,
    KeypointSettings,
    NetworkSettings,
    ResourceSettings,
    Stage1Settings,
    Stage2Settings,
    TrainSettings,
)
from sst.nn.augment import STRONGER, Augmentation

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
        "any faces on 2 CPU cores in half an hour: 96 px input, a network of 0.35 M parameters, 30 clusters",
        TrainSettings(
            network=NetworkSettings(input_size=96, width=64, depth=3, groups=8, descriptor_size=64),
            keypoints=KeypointSettings(outlier_reference=10_000, outlier_neighbours=7),
            cluster=ClusterSettings(clusters=30, sample=100_000),
            stage1=Stage1Settings(
                warmup_iterations=1_000,
                rounds=8,
                round_iterations=500,
                weight_decay=0.0,
                min_labels=4,
                detector_target="bump",
                detector_weight=2.0,
                threshold=0.15,
                augmentation=Augmentation(about="view"),
            ),
            stage2=Stage2Settings(
                iterations=6_000,
                batch=32,
                milestones=(4_000, 5_000),
                weight_decay=0.0,
                min_population=200,
                merge_after=2_000,
                merge_every=1_000,
                augmentation=replace(STRONGER, about="view"),
                # Places that the network is sure of reach 0.6 to 0.7; points that slide along a contour stay near 0.4.
                visible=0.4,
            ),
            resources=ResourceSettings(checkpoint_steps=200),
        ),
    ),
    "toy-cpu": (
        "the embedded corpus on 2 CPU cores in ten to fifteen minutes",
        TrainSettings(
            network=NetworkSettings(input_size=96, width=64, depth=3, groups=8, descriptor_size=64),
            keypoints=KeypointSettings(outlier_share=0.2, outlier_reference=5_000, outlier_neighbours=7),
            cluster=ClusterSettings(clusters=30, sample=50_000),
            stage1=Stage1Settings(
                warmup_iterations=400,
                rounds=4,
                round_iterations=150,
                weight_decay=0.0,
                min_labels=4,
                detector_target="bump",
                detector_weight=2.0,
                threshold=0.15,
                augmentation=Augmentation(about="view"),
            ),
            stage2=Stage2Settings(
                iterations=1_400,
                batch=32,
                milestones=(1_000, 1_200),
                weight_decay=0.0,
                min_population=60,
                merge_after=600,
                merge_every=400,
                augmentation=replace(STRONGER, about="view"),
            ),
            resources=ResourceSettings(checkpoint_steps=200),
        ),
    ),
    "bbcpose": ("BBC Pose signers: the settings of celeba, as nothing was published for them", TrainSettings()),
}
"""Name: what it is for, and its settings."""
