"""Views against PIL-free closed forms: each draw is checked as what it claims to be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax import synthesis
from kwjax.errors import KwjaxError
from kwjax.synthesis import Augmentation

augment = jax.jit(synthesis.augment, static_argnames=("config", "duplicates"))


def images(count: int = 3, size: int = 8) -> jax.Array:
  return jax.random.uniform(jax.random.key(1), (count, size, size, 3), minval=0.1, maxval=0.9)


def test_identity_only_copies() -> None:
  x = images()
  np.testing.assert_array_equal(augment(x, jax.random.key(0), Augmentation()), x)
  np.testing.assert_array_equal(augment(x, jax.random.key(0), Augmentation(), duplicates=2), jnp.repeat(x, 2, axis=0))


def test_pad_crop_and_flip_are_exact_shifts_of_the_zero_padded_image() -> None:
  x, pad, copies = np.asarray(images(1)), 2, 200
  views = np.asarray(augment(x, jax.random.key(0), Augmentation(pad_crop=pad, flip=True), duplicates=copies))
  padded = np.pad(x[0], ((pad, pad), (pad, pad), (0, 0)))
  possible = {}
  for dy in range(2 * pad + 1):
    for dx in range(2 * pad + 1):
      window = padded[dy : dy + 8, dx : dx + 8]
      possible[(dy, dx, False)], possible[(dy, dx, True)] = window, window[:, ::-1]
  drawn = []
  for view in views:
    hits = [name for name, image in possible.items() if np.array_equal(image, view)]
    assert hits, "a view is no crop of the padded image"
    drawn.append(hits[0])
  assert len(set(drawn)) > 40  # of 50 possible ones
  assert 60 < sum(flip for _, _, flip in drawn) < 140


def test_crop_resize_is_linear_interpolation_inside_the_image() -> None:
  ramp = jnp.broadcast_to(jnp.arange(16.0)[None, :, None, None] / 15, (1, 16, 16, 3))
  views = np.asarray(augment(ramp, jax.random.key(0), Augmentation(crop_resize=(0.25, 0.25)), duplicates=50))
  steps = np.diff(views[:, 2:-2, 8, 0], axis=1) * 15
  np.testing.assert_allclose(steps, 0.5, atol=1e-4)  # a quarter of the area: half the side, twice the resolution
  assert views.min() >= 0 and views.max() <= 1
  assert np.ptp(views[:, 8, 8, 0]) > 0.3  # the position varies
  assert np.allclose(
    np.asarray(augment(ramp, jax.random.key(0), Augmentation(crop_resize=(1.0, 1.0)))), ramp, atol=1e-6
  )


def test_cutout_blanks_a_square_with_the_fill() -> None:
  x = jnp.ones((1, 16, 16, 3))
  fill = jnp.array([0.2, 0.3, 0.4])
  views = np.asarray(augment(x, jax.random.key(0), Augmentation(cutout=0.5), duplicates=30, fill=fill))
  blank = np.isclose(views, np.asarray(fill)).all(-1)
  assert set(np.unique(views.round(4))) == {np.float32(v) for v in (0.2, 0.3, 0.4, 1.0)}
  area = blank.sum((1, 2))
  assert area.max() == 64  # a cutout may hang over the border, so most are smaller
  assert (area > 0).all()


def test_gradient_equals_finite_differences() -> None:
  config = Augmentation(crop_resize=(0.4, 1.0), pad_crop=1, flip=True, cutout=0.3)
  x, weights = images(2), jax.random.normal(jax.random.key(2), (4, 8, 8, 3))

  def loss(x: jax.Array) -> jax.Array:
    return jnp.sum(weights * augment(x, jax.random.key(0), config, duplicates=2, fill=0.5))

  direction = jax.random.normal(jax.random.key(3), x.shape)
  numeric = (loss(x + 0.1 * direction) - loss(x - 0.1 * direction)) / 0.2  # the views are linear in x
  np.testing.assert_allclose(jnp.sum(jax.grad(loss)(x) * direction), numeric, rtol=1e-3)


def test_a_view_depends_on_its_index_not_on_how_the_batch_is_split() -> None:
  config = Augmentation(crop_resize=(0.4, 1.0), flip=True, cutout=0.3)
  x = images(4)
  whole = augment(x, jax.random.key(0), config, duplicates=2)
  parts = [augment(x[i : i + 2], jax.random.key(0), config, duplicates=2, offset=i) for i in (0, 2)]
  np.testing.assert_allclose(jnp.concatenate(parts), whole, atol=1e-6)
  assert not np.allclose(whole, augment(x, jax.random.key(1), config, duplicates=2))


def test_the_first_copy_can_be_kept() -> None:
  config = Augmentation(crop_resize=(0.4, 0.5), pad_crop=1, flip=True, cutout=0.3, keep_first=True)
  views = np.asarray(augment(images(), jax.random.key(0), config, duplicates=3)).reshape(3, 3, 8, 8, 3)
  np.testing.assert_allclose(views[:, 0], images(), atol=1e-6)
  assert not np.isclose(views[:, 1:], np.asarray(images())[:, None]).all((2, 3, 4)).any()


@pytest.mark.parametrize(
  "options", [{"crop_resize": (0.0, 1.0)}, {"crop_resize": (0.9, 0.5)}, {"pad_crop": -1}, {"cutout": 1.0}]
)
def test_impossible_settings_are_refused(options: dict) -> None:
  with pytest.raises(KwjaxError):
    Augmentation(**options)
