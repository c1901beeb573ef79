"""Image and points move together, whatever the matrix."""

from dataclasses import replace

import kornia
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sst.nn.augment import Augmentation, Colours, augment, invert_affine, random_affine, warp_images
from sst.nn.geometry import STRIDE, box_to_view, resize_matrix, transform, transform_points

SIZE = 64


def photometric(x, settings, generator):
    return Colours.draw(len(x), settings, generator)(x, generator)


def blobs(points_N2: np.ndarray, height: int, width: int) -> np.ndarray:
    """A dark image with one bright Gaussian blob per point, drawn by the definition."""
    y, x = np.mgrid[0:height, 0:width]
    image = sum(np.exp(-((x - px) ** 2 + (y - py) ** 2) / 8.0) for px, py in points_N2)
    return np.repeat((np.clip(image, 0, 1) * 255).astype(np.uint8)[..., None], 3, 2)


def centroid(channel: np.ndarray) -> np.ndarray:
    y, x = np.mgrid[0 : channel.shape[0], 0 : channel.shape[1]]
    return np.array([(x * channel).sum(), (y * channel).sum()]) / channel.sum()


def test_box_corners_are_view_corners():
    matrix = box_to_view(np.array([10.0, 20.0, 50.0, 100.0]), 256)
    corners = transform_points(matrix, np.array([[10.0, 20.0], [50.0, 100.0], [30.0, 60.0]]))
    np.testing.assert_allclose(corners, [[0, 0], [256, 256], [128, 128]], atol=1e-9)


@given(st.floats(0.2, 3.0), st.floats(-5, 60))
def test_resize_keeps_pixel_areas(scale, x):
    # Pixel x covers [x - 0.5, x + 0.5]; borders scale about -0.5.
    left = transform_points(resize_matrix(scale, 1.0), np.array([[x - 0.5, 0.0]]))[0, 0]
    assert left + 0.5 == pytest.approx((x - 0.5 + 0.5) * scale, abs=1e-6)


@given(st.integers(0, 2**32 - 1))
def test_inverse_undoes_affine(seed):
    matrix = random_affine(3, SIZE, Augmentation(), torch.Generator().manual_seed(seed))
    points = torch.rand(3, 5, 2) * SIZE
    back = transform(invert_affine(matrix), transform(matrix, points))
    torch.testing.assert_close(back, points, atol=1e-3, rtol=0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("about", ["image", "view"])
def test_a_blob_in_the_image_is_where_its_point_is(seed, about):
    plain = Augmentation(
        blur_probability=0, contrast=(1, 1), noise_probability=0, brightness=(1, 1), colour_probability=0
    )
    place = np.array([[70.0, 45.0]])
    stored = torch.from_numpy(blobs(place, 90, 120))[None]
    to_view = box_to_view(np.array([40.0, 20.0, 100.0, 75.0]), SIZE)
    points = torch.from_numpy(transform_points(to_view, place) / STRIDE).float()[None]
    views, moved, inside = augment(
        stored,
        torch.tensor([[120.0, 90.0]]),
        torch.from_numpy(to_view).float()[None],
        points,
        SIZE,
        replace(plain, about=about),
        torch.Generator().manual_seed(seed),
    )
    assert inside.tolist() == [[True]]
    np.testing.assert_allclose(centroid(views[0, 0].numpy()), moved[0, 0].numpy() * STRIDE, atol=0.3)


def test_warp_equals_kornia():
    image = torch.randint(0, 256, (2, 50, 70, 3), dtype=torch.uint8)
    matrix = random_affine(2, SIZE, Augmentation(), torch.Generator().manual_seed(1))
    ours = warp_images(image, matrix, SIZE)
    theirs = kornia.geometry.transform.warp_perspective(
        image.permute(0, 3, 1, 2).float() / 255, matrix, (SIZE, SIZE), align_corners=True
    )
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)


def test_points_that_leave_the_view_are_known():
    views, moved, inside = augment(
        torch.zeros(1, 8, 8, 3, dtype=torch.uint8),
        torch.tensor([[8.0, 8.0]]),
        torch.eye(3)[None],
        torch.tensor([[[-30.0, 2.0], [8.0, 8.0]]]),
        SIZE,
        Augmentation(about="view"),
        torch.Generator().manual_seed(0),
    )
    assert views.shape == (1, 3, SIZE, SIZE) and moved.shape == (1, 2, 2)
    assert inside.tolist() == [[False, True]]


def test_drawn_ranges():
    settings = Augmentation(scale=(0.7, 1.3), shift=0.05, rotation=40.0)
    matrix = random_affine(4000, SIZE, settings, torch.Generator().manual_seed(0)).double()
    scale = matrix[:, :2, :2].norm(dim=1)
    angle = torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0]).rad2deg()
    centre = torch.full((4000, 1, 2), (SIZE - 1) / 2, dtype=torch.float64)
    shift = (transform(matrix, centre) - centre).abs() / SIZE
    assert 0.7 <= scale.min() < 0.71 and 1.29 < scale.max() <= 1.3
    assert -40 <= angle.min() < -39.5 and 39.5 < angle.max() <= 40
    assert 0.049 < shift.max() <= 0.05 + 1e-6


def test_photometric_hue_and_saturation_equal_kornia():
    only_colour = Augmentation(
        blur_probability=0,
        contrast=(1, 1),
        noise_probability=0,
        brightness=(1, 1),
        colour_probability=1.0,
        colour=(0.6, 0.6),
    )
    x = torch.rand(2, 3, 16, 16)
    ours = photometric(x, only_colour, torch.Generator().manual_seed(0))
    hsv = kornia.color.rgb_to_hsv(x)
    hsv = torch.stack([hsv[:, 0] * 0.6, (hsv[:, 1] * 0.6).clamp(0, 1), hsv[:, 2]], 1)
    torch.testing.assert_close(ours, kornia.color.hsv_to_rgb(hsv), atol=1e-3, rtol=0)


def drawn(count: int, seed: int, **ranges) -> Colours:
    return Colours.draw(count, Augmentation(**ranges), torch.Generator().manual_seed(seed))


@given(st.integers(0, 2**32 - 1))
def test_colours_are_changed_in_the_published_order(seed):
    """Against the same, image by image in float64: blur (kornia's), contrast, brightness, then hue and saturation.

    What the published images hold are bytes, so each change ends at black and white.
    """
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    colours = drawn(4, seed, noise=0.0, contrast=(0.75, 1.5), brightness=(0.8, 1.2))
    for number, image in enumerate(x.double()[:, None]):
        if colours.blurred_B[number]:
            sigma = float(colours.sigma_B[number].clamp_min(1e-3))
            image = kornia.filters.gaussian_blur2d(image, (5, 5), (sigma, sigma), border_type="replicate")
        image = ((image - 0.5) * float(colours.contrast_B111[number]) + 0.5).clamp(0, 1)
        image = (image * colours.brightness_B311[number]).clamp(0, 1)
        if colours.recoloured_B[number]:
            hue, saturation, value = kornia.color.rgb_to_hsv(image)[0]
            hue = hue * float(colours.hue_B[number]) % (2 * np.pi)
            saturation = (saturation * float(colours.saturation_B[number])).clamp(0, 1)
            image = kornia.color.hsv_to_rgb(torch.stack([hue, saturation, value])[None])
        ours = colours[number : number + 1](x[number : number + 1], torch.Generator())
        torch.testing.assert_close(ours.double(), image, atol=1e-4, rtol=0)


def test_noise_has_its_deviation_in_the_noisy_images_and_their_brightness():
    plain = {"blur_probability": 0, "colour_probability": 0, "contrast": (1, 1)}
    colours = drawn(40, 0, noise_probability=0.5, noise=0.05, **plain)
    changed = colours(torch.full((40, 3, 64, 64), 0.5), torch.Generator().manual_seed(1))
    deviation = changed.std((-2, -1))
    expected = (colours.noisy_B[:, None] * colours.noise_B111[:, :, 0, 0]) * colours.brightness_B311[..., 0, 0]
    assert 10 < int(colours.noisy_B.sum()) < 30
    grey = (changed / colours.brightness_B311).diff(dim=1).abs().amax((1, 2, 3))[colours.noisy_B] < 1e-6
    assert grey.tolist() == colours.grey_noise_B[colours.noisy_B].tolist() and 0 < grey.sum() < len(grey)
    torch.testing.assert_close(deviation, expected, atol=2e-3, rtol=0.05)
    torch.testing.assert_close(changed.mean((-2, -1)), 0.5 * colours.brightness_B311[..., 0, 0], atol=5e-3, rtol=0)


@pytest.mark.parametrize("noise_probability", [0.0, 1.0])
def test_a_gpu_changes_the_same_images_without_asking_which(monkeypatch, noise_probability):
    """The path that never asks the device is taken here on the CPU, where all else is equal."""
    x, colours = torch.rand(12, 3, 16, 16), drawn(12, 5, noise_probability=noise_probability)
    asking = colours(x, torch.Generator().manual_seed(1))
    monkeypatch.setattr("sst.nn.augment.free_to_look", lambda device: False)
    torch.testing.assert_close(colours(x, torch.Generator().manual_seed(1)), asking, atol=1e-6, rtol=0)


@pytest.mark.parametrize("pixels", [1, 3 * SIZE**2, 2**30])
def test_views_do_not_depend_on_how_many_are_made_at_once(monkeypatch, pixels):
    told = Augmentation(noise=0.0)
    stored = torch.randint(0, 256, (7, 40, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sides = torch.tensor([[50.0, 40.0]]).expand(7, 2)
    arguments = sides, torch.eye(3).expand(7, 3, 3), torch.rand(7, 2, 2) * 15, SIZE, told
    at_once = augment(stored, *arguments, torch.Generator().manual_seed(2))
    monkeypatch.setattr("sst.nn.augment.CACHED_PIXELS", pixels)
    assert all(map(torch.equal, augment(stored, *arguments, torch.Generator().manual_seed(2)), at_once))


def test_photometric_is_a_function_of_the_generator():
    x = torch.rand(4, 3, 16, 16)
    runs = [photometric(x, Augmentation(), torch.Generator().manual_seed(s)) for s in (3, 3, 4)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert all(run.min() >= 0 and run.max() <= 1 for run in runs)
