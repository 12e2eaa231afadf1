"""Dead leaves against a plain painter, and against the statistics that the model is known for."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from kwjax.errors import KwjaxError
from kwjax.synthesis import LEAF_SHAPES, dead_leaves
from kwjax.synthesis.dead_leaves_model import CHUNK, RADII, radius_table, to_unit_interval


def painted(key: jax.Array, index: int, shape: tuple[int, int, int], kinds: tuple[int, ...], count: int) -> np.ndarray:
  """One image leaf by leaf from the back to the front, in float64, from the same random numbers."""
  height, width, channels = shape
  shape_key, colour_key = (jax.random.fold_in(part, index) for part in jax.random.split(key))
  table = radius_table(*RADII)
  y, x = np.mgrid[:height, :width].astype(float)
  image = np.zeros(shape, np.float32)
  for number in reversed(range(count)):
    chunk, place = divmod(number, CHUNK)
    bits = jax.random.bits(jax.random.fold_in(shape_key, chunk * CHUNK), (9, CHUNK))[:, place]
    u = np.asarray(to_unit_interval(bits), np.float64)
    radius = max(float(table[int(u[0] * 4096)]) * max(height, width), 1.0)
    cy, cx = u[1] * height, u[2] * width
    kind = kinds[int(u[3] * len(kinds))]
    angles = {
      1: np.pi / 4 + np.pi / 2 * np.arange(4),
      2: np.pi / 4 + np.pi / 2 * np.arange(4) + 2 * np.pi * u[4],
      3: np.array([0, np.pi, np.pi, 2 * np.pi]) + np.array([1, -1, 1, -1]) * np.pi / 2 * u[4],
      4: 2 * np.pi * np.sort(u[5:8]),
      5: 2 * np.pi * np.sort(u[5:9]),
    }
    if kind == 0:
      inside = (y - cy) ** 2 + (x - cx) ** 2 <= radius**2
    else:
      corners = np.stack([cy + radius * np.sin(angles[kind]), cx + radius * np.cos(angles[kind])], 1)
      inside = np.ones(y.shape, bool)
      for (y0, x0), (y1, x1) in zip(corners, np.roll(corners, -1, 0), strict=True):
        inside &= (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) >= 0
    colour = to_unit_interval(jax.random.bits(jax.random.fold_in(colour_key, number), (channels,)))
    image[inside] = np.asarray(colour)
  return image


@pytest.mark.parametrize("shape", LEAF_SHAPES)
def test_front_to_back_is_what_a_painter_makes_back_to_front(shape: str) -> None:
  key, size = jax.random.key(3), (12, 16, 2)
  made = np.asarray(dead_leaves(key, 2, size, shapes=shape, max_leaves=40))
  for index in range(2):
    expected = painted(key, index, size, (LEAF_SHAPES.index(shape),), 40)
    # Single precision decides otherwise at an edge, for a pixel in a few hundred.
    assert (made[index] == expected).all(-1).mean() > 0.97


def test_radii_follow_the_power_law() -> None:
  for low_bound, high_bound in ((0.03, 1.0), (0.1, 0.4)):
    radii = radius_table(low_bound, high_bound)
    fine = np.linspace(low_bound, high_bound, 100_000)
    density = fine**-3 - high_bound**-3
    for low, high in ((low_bound, 1.5 * low_bound), (1.5 * low_bound, 3 * low_bound), (3 * low_bound, high_bound)):
      expected = density[(fine >= low) & (fine < high)].sum() / density.sum()
      assert abs(((radii >= low) & (radii < high)).mean() - expected) < 0.03


def test_images_are_flat_coloured_covered_and_reproducible() -> None:
  images = np.asarray(dead_leaves(jax.random.key(0), 6, (24, 24, 3)))
  assert images.shape == (6, 24, 24, 3)
  assert images.min() >= 0 and images.max() < 1
  assert not (images == 0).all(-1).any()  # no pixel is left uncovered
  # Flat leaves: neighbours are often exactly equal, which no smooth or noisy image is.
  assert 0.2 < (images[:, :, 1:] == images[:, :, :-1]).all(-1).mean() < 0.95
  np.testing.assert_array_equal(images, dead_leaves(jax.random.key(0), 6, (24, 24, 3)))
  assert not np.array_equal(images[0], images[1])
  np.testing.assert_allclose(images.mean(), 0.5, atol=0.1)  # colours are uniform


def test_power_spectrum_and_neighbours_are_those_of_natural_images() -> None:
  size, count = 64, 48
  images = np.asarray(dead_leaves(jax.random.key(1), count, (size, size, 1)))[..., 0].astype(np.float64)
  window = np.hanning(size)[:, None] * np.hanning(size)[None, :]
  power = (np.abs(np.fft.fft2((images - images.mean()) * window)) ** 2).mean(0)
  frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size))) * size
  rings = [(low, low * 1.3) for low in 2.5 * 1.3 ** np.arange(9)]  # 2.5 to 26 cycles an image, one decade
  means = [power[(frequency >= low) & (frequency < high)].mean() for low, high in rings]
  slope = np.polyfit(np.log([np.sqrt(low * high) for low, high in rings]), np.log(means), 1)[0]
  # Power falls with frequency f as f^-2 to f^-3 (amplitude as 1/f), for the density r^-3: Lee, Mumford & Huang (2001).
  assert -3.2 < slope < -1.8
  # Occlusion: two pixels belong to one leaf, and are equal, or are independent. So E(a - b)^2 = (1 - P(equal)) / 6.
  for distance in (1, 4, 12):
    a, b = images[:, :, distance:], images[:, :, :-distance]
    different = (a != b).mean()
    assert np.mean((a - b) ** 2) == pytest.approx(different / 6, rel=0.12)


def test_stages_batches_and_devices_make_no_difference() -> None:
  """Neither which images are laid together nor where."""
  key = jax.random.key(0)
  many = dead_leaves(key, 66, (12, 8, 3))
  assert many.shape == (66, 12, 8, 3)
  few = dead_leaves(key, 3, (12, 8, 3))
  np.testing.assert_array_equal(many[:3], few)
  np.testing.assert_array_equal(few, dead_leaves(key, 3, (12, 8, 3), devices=jax.devices()[:2]))


def test_too_few_leaves_leave_black() -> None:
  assert (np.asarray(dead_leaves(jax.random.key(0), 4, (24, 24, 3), max_leaves=1)) == 0).all(-1).any()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"shapes": "star"}, "'star'; known: mixed, circle"),
    ({"shapes": ()}, "known: mixed, circle"),
    ({"radii": (0.5, 0.1)}, "0 < smallest < largest, found 0.5 and 0.1"),
    ({"radii": (0.0, 0.1)}, "0 < smallest"),
  ],
)
def test_bad_arguments_are_named(options: dict, message: str) -> None:
  with pytest.raises(KwjaxError, match=message):
    dead_leaves(jax.random.key(0), 1, (8, 8, 3), **options)
