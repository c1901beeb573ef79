"""What the authors' published code computes, replayed step by step in plain loops, against what is done here.

Each replay is written from a reading of that code (Mallis et al., NeurIPS 2020), without looking at ours;
docs/fidelity.md says which row each one shows.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.merging import apply_merge, count_overlaps, merge_plan
from cluster.shards import Labels
from sst.nn.augment import STRONGER, Augmentation, Colours, augment, warp_images
from sst.nn.geometry import box_to_view
from sst.nn.losses import Labelled, descriptor_loss, detector_loss, landmark_loss, landmark_target
from sst.nn.network import LandmarkDetector, NetworkShape
from sst.nn.steps import Stage2Step, random_batch, stage2_losses
from sst.nn.suppression import decode_keypoints, unite
from sst.presets import PRESETS
from sst.train.schedule import learning_rate, plan

CELEBA = PRESETS["celeba"][1]


def replayed_stage_1() -> tuple[list[list[float]], int]:
    """Learning rate of every step, a list for each training between two correspondences; and the last step's number.

    A counter of iterations goes through all 30 trainings. At its multiples of 2,000 after the warm-up the schedule is
    moved on, and where that brings back the first rate the training ends; the counter then skips a number.
    """
    weights = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.RMSprop(weights, lr=5e-4, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=5, T_mult=1, eta_min=5e-6)
    optimizer.step()  # torch wants to see a step before the schedule's first
    iteration, trainings = 0, []
    for _ in range(30):
        rates: list[float] = []
        while True:
            if iteration == 20_000:
                break
            if iteration % 2_000 == 0 and iteration > 20_000:
                schedule.step()
                if optimizer.param_groups[0]["lr"] == 5e-4:
                    break
            rates.append(optimizer.param_groups[0]["lr"])
            iteration += 1
        iteration += 1
        trainings.append(rates)
    return trainings, iteration - 1


def replayed_stage_2(epoch_batches: int) -> tuple[list[float], list[int]]:
    """Learning rate of every step, and the steps taken before each merging; a step sees two batches."""
    optimizer = torch.optim.RMSprop([torch.nn.Parameter(torch.zeros(1))], lr=5e-4)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    optimizer.step()
    iteration, rates, mergings, epochs_to_wait = 0, [], [], 0
    while iteration < 80_000:
        for half in range(epoch_batches):
            if iteration in (50_000, 65_000):
                schedule.step()
                iteration += 1
            if half % 2 == 1:
                rates.append(optimizer.param_groups[0]["lr"])
                iteration += 1
        if iteration > 25_000:
            if epochs_to_wait == 0:
                mergings.append(len(rates))
            epochs_to_wait = 1 - epochs_to_wait
    return rates, mergings


def runs_of_equal(values: list[float]) -> list[tuple[float, int]]:
    return [(value, len(list(group))) for value, group in itertools.groupby(values)]


def test_stage_1_has_the_published_steps_rates_and_correspondences():
    trainings, counted = replayed_stage_1()
    ours = [phase for phase in plan(CELEBA, 160_000) if phase.stage == 1]
    assert len(ours) == len(trainings) == 30  # a correspondence follows each: the last one labels stage 2
    assert sum(phase.steps for phase in ours) == counted == 310_000
    for phase, theirs in [(ours[n], trainings[n]) for n in (0, 1, 2, 29)]:
        rates = [learning_rate(CELEBA, phase, step) for step in range(phase.steps)]
        for (own, steps), (rate, published) in zip(runs_of_equal(rates), runs_of_equal(theirs), strict=True):
            assert own == pytest.approx(rate, rel=1e-12)
            assert steps - published in (0, 1)  # the number that the counter skips
    assert [f"{1e4 * rate:.2f}" for rate, _ in runs_of_equal(trainings[-1])] == ["5.00", "4.53", "3.29", "1.76", "0.52"]
    assert set(trainings[0]) == {5e-4}


def test_stage_2_has_the_published_steps_rates_and_mergings():
    images = 64 * 1_000
    rates, mergings = replayed_stage_2(images // 32)
    ours = [phase for phase in plan(CELEBA, images) if phase.stage == 2]
    own = [learning_rate(CELEBA, phase, step) for phase in ours for step in range(phase.steps)]
    # The counter skips a number at each milestone, so the second comes a step early; the last epoch is finished.
    for (rate, steps), (theirs, published) in zip(runs_of_equal(own), runs_of_equal(rates), strict=True):
        assert rate == pytest.approx(theirs, rel=1e-12) and (abs(steps - published) <= 1 or theirs < 6e-6)
    assert 80_000 == len(own) <= len(rates) < 81_000
    starts = [phase.stage_step for phase in ours[1:]]
    # They merge at the end of the epoch in which step 25,000 falls.
    assert len(starts) == pytest.approx(len(mergings), abs=1)
    assert all(0 <= theirs - start <= 1_000 for theirs, start in zip(mergings, starts, strict=False))
    assert {b - a for a, b in itertools.pairwise(mergings)} == {b - a for a, b in itertools.pairwise(starts)} == {2_000}


def replayed_pairs(labels1: np.ndarray, labels2: np.ndarray, room: int) -> list[tuple[int, int, bool]]:
    """Pairs of points of two views, rows (x, y, cluster) in cells of a 64 x 64 map: positives, then negatives.

    But for two slips, which docs/fidelity.md names: negatives spare the last row and column, and whether the second
    point's cluster occurs in both images is looked up at its neighbour in the list.
    """

    def within(row: np.ndarray) -> bool:
        return bool((row[:2] >= 0).all() and (row[:2] <= 63).all())

    pairs = []
    for i, a in enumerate(labels1):
        for j, b in enumerate(labels2):
            if a[2] == b[2] and within(a) and within(b):
                pairs.append((i, j, True))
    for i, a in enumerate(labels1):
        if a[2] not in labels2[:, 2]:
            continue
        for j, b in enumerate(labels2):
            if b[2] == a[2] or b[2] not in labels1[:, 2]:
                continue
            if within(a) and within(b):
                if len(pairs) >= room - 1:
                    break
                pairs.append((i, j, False))
    return pairs


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), room=st.sampled_from([3_000, 40, 13]))
def test_descriptor_loss_is_that_of_the_published_table_of_pairs(seed, room):
    rng = np.random.default_rng(seed)
    maps = rng.normal(size=(2, 2, 64, 64, 8)) * 0.2  # view, image, row, column, channel
    maps[1, 0] = maps[0, 0]  # so that some pairs lie at distance 0
    views = []
    for _ in range(2):
        rows = [
            np.column_stack([rng.integers(-8, 72, (count, 2)), rng.permutation(12)[:count]])
            for count in rng.integers(5, 11, 2)
        ]
        views.append(rows)
    terms = []
    for image in range(2):
        first, second = views[0][image], views[1][image]
        for i, j, same in replayed_pairs(first, second, room):
            one = maps[0, image, first[i, 1], first[i, 0]]
            other = maps[1, image, second[j, 1], second[j, 0]]
            square = ((one - other) ** 2).sum()
            terms.append(square if same else max(0.0, 0.8 - math.sqrt(square + 1e-9)) ** 2)

    def padded(view: int) -> tuple[torch.Tensor, Labelled]:
        described, cluster = torch.zeros(2, 12, 8), torch.full((2, 12), -1)
        inside = torch.ones(2, 12, dtype=torch.bool)
        for image, rows in enumerate(views[view]):
            for slot, (x, y, number) in enumerate(rows):
                cluster[image, slot] = int(number)
                inside[image, slot] = bool(0 <= x <= 63 and 0 <= y <= 63)
                if inside[image, slot]:
                    described[image, slot] = torch.from_numpy(maps[view, image, y, x])
        return described, Labelled(cluster, inside)

    (first, labels1), (second, labels2) = padded(0), padded(1)
    ours = descriptor_loss(first, second, labels1, labels2, 0.8, maximum=room - 1)
    assert int(ours.terms) == len(terms)
    assert float(ours.mean()) == pytest.approx(np.mean(terms) if terms else 0.0, rel=1e-4, abs=1e-6)


def test_no_more_pairs_are_compared_than_the_published_table_holds():
    every = Labelled(torch.arange(100)[None], torch.ones(1, 100, dtype=torch.bool))
    descriptors = torch.zeros(1, 100, 4)
    assert int(descriptor_loss(descriptors, descriptors, every, every, 0.8).terms) == 3_000 - 1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_detector_loss_is_the_published_one(seed):
    """torch's own mean squared error of a batch, to maps with a 1 at the rounded place of each label in view."""
    rng = np.random.default_rng(seed)
    heat, points = rng.random((3, 1, 64, 64)), rng.uniform(-10, 74, (3, 15, 2)).astype(np.float32)
    target = np.zeros_like(heat)
    inside = torch.zeros(3, 15, dtype=torch.bool)
    for image, label in itertools.product(range(3), range(15)):
        column, row = (round(float(value)) for value in points[image, label])
        if 0 <= column < 64 and 0 <= row < 64:
            target[image, 0, row, column] = 1
            inside[image, label] = True
    theirs = torch.nn.MSELoss()(torch.from_numpy(heat), torch.from_numpy(target))
    ours = detector_loss(torch.from_numpy(heat), torch.from_numpy(points), torch.where(inside, 3, -1)).mean()
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def drawn_as_published(point: tuple[float, float]) -> np.ndarray:
    """The published 3 x 3 bump around the rounded point, as far as it lies within 64 x 64 cells; (y, x)."""
    table = {(0, 0): 1.0, (0, 1): 0.41111228, (1, 0): 0.41111228, (1, 1): 0.16901332}
    target, column, row = np.zeros((64, 64)), round(point[0]), round(point[1])
    for dy, dx in itertools.product((-1, 0, 1), repeat=2):
        if 0 <= row + dy < 64 and 0 <= column + dx < 64:
            target[row + dy, column + dx] = table[abs(dy), abs(dx)]
    return target


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_stage_2_loss_is_the_published_one_also_for_labels_that_left_the_view(seed):
    """A mean over the active channels that are labelled in their image, wherever augmentation has moved the label."""
    rng = np.random.default_rng(seed)
    heat = rng.normal(0, 0.5, (3, 6, 64, 64))
    active = rng.random(6) < 0.8
    points = rng.integers(-12, 76, (3, 4, 2))
    clusters = np.stack([rng.permutation(6)[:4] for _ in range(3)])
    taken = []
    for image in range(3):
        for point, cluster in zip(points[image], clusters[image], strict=True):
            if active[cluster]:
                taken.append((heat[image, cluster] - drawn_as_published(tuple(point))) ** 2)
    ours, _ = landmark_loss(
        torch.from_numpy(heat), torch.from_numpy(points).float(), torch.from_numpy(clusters), torch.from_numpy(active)
    )
    assert float(ours.mean()) == pytest.approx(np.mean(taken) if taken else 0.0, rel=1e-4)


def test_a_network_that_draws_a_label_that_left_the_view_is_corrected():
    heat = torch.from_numpy(drawn_as_published((30, 30)))[None, None].float()
    gone, _ = landmark_loss(
        heat, torch.tensor([[[-5.0, 30.0]]]), torch.zeros(1, 1, dtype=torch.int64), torch.tensor([True])
    )
    assert float(gone.mean()) == pytest.approx((1 + 4 * 0.41111228**2 + 4 * 0.16901332**2) / 4_096, rel=1e-5)


def test_a_step_of_stage_2_is_two_published_halves():
    """Both halves' mean losses are sent back without a step between them; here they have equally many labels."""
    network = LandmarkDetector(NetworkShape(width=16, depth=1, groups=2, descriptor_size=16), 6)
    batch, active = random_batch(4, 32, 6), torch.ones(6, dtype=torch.bool)
    batch = replace(batch, points=batch.points[:, :6], cluster=torch.arange(6).expand(4, 6))
    still = Augmentation(0, 0.5, (1, 1), 0, 0, 0, (1, 1), 0, 0, scale=(1, 1), shift=0, rotation=0)
    step = Stage2Step(32, "float32", augmentation=still)
    stage2_losses(network, batch, active, step, torch.Generator()).total().backward()
    ours = [weight.grad.clone() for weight in network.parameters()]
    network.zero_grad()
    views = warp_images(batch.images, batch.to_view, 32)
    for half in (slice(2), slice(2, 4)):
        targets = landmark_target(batch.points[half], batch.cluster[half], 6, 8, 8)[0]
        torch.nn.MSELoss()(network(views[half]), targets).backward()
    for mine, weight in zip(ours, network.parameters(), strict=True):
        torch.testing.assert_close(mine, weight.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("told", [Augmentation(), STRONGER])
def test_views_are_moved_as_the_published_ones(told):
    """The whole image is scaled, rotated and shifted about its middle, and the same box as before is cut out of it.

    Labels go from heatmap to image by the box, move with the image, and come back by the box; the motion is read off
    from three of them.
    """
    width, height, count, side = 178, 218, 2_000, 32
    minx, miny, maxx, maxy = 30.0, 60.0, 140.0, 200.0
    corners = np.array([[1.0, 1.5], [6.0, 1.5], [1.0, 7.0]])
    _, moved, _ = augment(
        torch.zeros(count, 4, 4, 3, dtype=torch.uint8),
        torch.tensor([[float(width), float(height)]]).expand(count, 2),
        torch.from_numpy(box_to_view(np.array([minx, miny, maxx, maxy]), side)).float().expand(count, 3, 3),
        torch.from_numpy(corners).float().expand(count, 3, 2),
        side,
        told,
        torch.Generator().manual_seed(0),
    )

    def in_image(points: np.ndarray) -> np.ndarray:
        return np.stack(
            [4 * points[..., 0] * (maxx - minx) / side + minx, 4 * points[..., 1] * (maxy - miny) / side + miny], -1
        )

    before = np.column_stack([in_image(corners), np.ones(3)])
    affine = np.linalg.solve(before, in_image(moved.numpy().astype(np.float64)))  # (count, 3, 2), transposed
    linear, middle = affine[:, :2].transpose(0, 2, 1), np.array([(width - 1) / 2, (height - 1) / 2])
    scale = np.linalg.norm(linear, axis=1)
    angle = np.rad2deg(np.arctan2(linear[:, 1, 0], linear[:, 0, 0]))
    shift = np.abs(linear @ middle + affine[:, 2] - middle) / [width, height]
    right_angle = (linear[:, :, 0] * linear[:, :, 1]).sum(1) / scale.prod(1)
    assert np.abs(right_angle).max() < 1e-3  # axes are scaled first, then turned, in pixels of the image
    low, high = told.scale
    for values, least, most in ((scale, low, high), (angle, -40, 40), (shift, 0, 0.05)):
        slack = (most - least) * 0.02
        assert least - 1e-3 <= values.min() < least + slack and most - slack < values.max() <= most + 1e-3


@pytest.mark.parametrize(("told", "share"), [(Augmentation(), 0.5), (STRONGER, 1.0)])
def test_noise_is_in_the_published_share_of_the_images_and_grey_in_half_of_them(told, share):
    count = 2_000
    colours = Colours.draw(count, told, torch.Generator().manual_seed(0))
    changed = colours(torch.full((count, 3, 4, 4), 0.5), torch.Generator().manual_seed(1)) / colours.brightness_B311
    changed = changed[~colours.recoloured_B & ~colours.blurred_B]
    noisy = changed.std((2, 3)).amax(1) > 1e-5
    apart = changed[noisy].diff(dim=1).abs().amax((1, 2, 3)) > 1e-5
    assert float(noisy.float().mean()) == pytest.approx(share, abs=0.05)
    assert float(apart.float().mean()) == pytest.approx(0.5, abs=0.05)


def overlap(a: tuple[int, int], b: tuple[int, int]) -> float:
    """Intersection over union of squares of half side 1."""
    width, height = (max(0, min(p, q) + 1 - (max(p, q) - 1)) for p, q in zip(a, b, strict=True))
    return width * height / (8 - width * height)


def greedy(cells: list[tuple[int, int]], scores: list[float]) -> list[int]:
    """From the highest score on, what overlaps one that stays by more than 0.01 falls; numbers in that order."""
    kept: list[int] = []
    for number in sorted(range(len(cells)), key=lambda n: -scores[n]):
        if all(overlap(cells[number], cells[other]) <= 0.01 for other in kept):
            kept.append(number)
    return kept


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_points_of_a_round_are_those_of_the_published_suppressions(seed):
    """Detector above 0.2, suppressed; then once more together with the previous labels, all of which score higher."""
    rng = np.random.default_rng(seed)
    heat = rng.random((2, 1, 12, 14)).astype(np.float32) * (rng.random((2, 1, 12, 14)) < 0.4)
    labels = [rng.uniform(-0.4, [13.4, 11.4], (count, 2)).astype(np.float32) for count in rng.integers(0, 15, 2)]
    padded = torch.full((2, 15, 2), torch.nan)
    expected = []
    for image, own in enumerate(labels):
        padded[image, : len(own)] = torch.from_numpy(own)
        cells = [(x, y) for y in range(12) for x in range(14) if heat[image, 0, y, x] > 0.2]
        found = [cells[n] for n in greedy(cells, [float(heat[image, 0, y, x]) for x, y in cells])]
        both = [(round(float(x)), round(float(y))) for x, y in own] + found
        expected.append(sorted(both[n] for n in greedy(both, [0.2] * len(own) + [0.1] * len(found))))
    image_M, found_M2, _ = decode_keypoints(torch.from_numpy(heat), 0.2)
    image, united = unite(padded, image_M, found_M2, 12, 14)
    assert image.tolist() == sorted(image.tolist())
    assert [sorted(map(tuple, united[image == n].round().int().tolist())) for n in range(2)] == expected


def test_previous_labels_keep_their_place_and_suppress_each_other():
    previous = torch.tensor([[[2.4, 3.3], [3.4, 3.6], [8.0, 8.0], [torch.nan, torch.nan]]])
    found = torch.tensor([[3.6, 2.2], [9.49, 8.0], [9.51, 8.0]])  # columns 4, 9 and 10
    image, united = unite(previous, torch.zeros(3, dtype=torch.int64), found, 12, 12)
    assert united.tolist() == [[pytest.approx(v) for v in row] for row in ([2.4, 3.3], [8, 8], [3.6, 2.2], [9.51, 8])]
    assert image.tolist() == [0] * 4


Rows = list[tuple[float, float, int]]


def replayed_merging(
    peaks: np.ndarray, confidence: np.ndarray, labels: list[Rows], active: list[int]
) -> tuple[list[int], list[Rows]]:
    """The published merging: which channels stay active, and the labels of every image afterwards."""
    clusters = peaks.shape[1]
    population = [sum(cluster == k for rows in labels for _, _, cluster in rows) for k in range(clusters)]
    sure = [[k for k in active if confidence[image, k] > 0.2] for image in range(len(peaks))]
    confident = {k: sum(k in own for own in sure) for k in active}

    def together(a: int, b: int) -> int:
        return sum(
            a in own and b in own and math.dist(peaks[image, a], peaks[image, b]) < 5.7
            for image, own in enumerate(sure)
        )

    absorbed: dict[int, list[int]] = {}
    for channel in sorted(active, key=lambda k: -population[k]):
        for kept, members in absorbed.items():
            if together(kept, channel) > 0.7 * min(confident[kept], confident[channel]):
                members.append(channel)
                break
        else:
            absorbed[channel] = []
    after = []
    for rows in labels:
        for kept, members in absorbed.items():
            if any(cluster in members for _, _, cluster in rows):
                names = [cluster for _, _, cluster in rows if cluster in (*members, kept)]
                biggest = max(names, key=lambda k: population[k])
                rows = [row for row in rows if row[2] not in names or row[2] == biggest]
                rows = [(x, y, kept if cluster == biggest else cluster) for x, y, cluster in rows]
        after.append(rows)
    return sorted(absorbed), after


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_merging_goes_by_labels_as_published(seed):
    """Most labelled first, though other channels may be sure of themselves more often."""
    rng = np.random.default_rng(seed)
    images, clusters = 20, 6
    # Peaks lie on the published grid of 4 px, around three places.
    peaks = 4.0 * (rng.permutation(np.repeat([5, 20, 40], 2))[:, None] + rng.integers(0, 2, (images, clusters, 2)))
    confidence = rng.choice([0.1, 0.6], (images, clusters), p=[0.2, 0.8])
    wanted = rng.permutation(np.arange(4, 4 + 2 * clusters, 2))  # no two clusters have equally many labels
    given_to = [rng.permutation(images)[:count] for count in wanted]
    labels = [
        [(float(x), float(y), k) for k in range(clusters) if image in given_to[k] for x, y in [rng.integers(0, 64, 2)]]
        for image in range(images)
    ]
    active = sorted(rng.permutation(clusters)[: rng.integers(3, clusters + 1)].tolist())
    stay, after = replayed_merging(peaks, confidence, labels, active)

    is_active = np.isin(np.arange(clusters), active)
    mapping = merge_plan(count_overlaps(peaks, np.where(is_active, confidence, 0.0)), wanted)
    flat = [row for rows in labels for row in rows]
    stored = Labels(
        np.cumsum([0, *map(len, labels)]),
        np.array([row[:2] for row in flat], np.float32),
        np.array([row[2] for row in flat], np.int16),
        np.zeros(len(flat), np.float32),
    )
    merged = apply_merge(stored, mapping, wanted)
    assert np.flatnonzero(is_active & (mapping == np.arange(clusters))).tolist() == stay
    for image, rows in enumerate(after):
        points, names = merged.sample(image)
        assert sorted((*map(float, point), int(name)) for point, name in zip(points, names, strict=True)) == sorted(
            rows
        )
