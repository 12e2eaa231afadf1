"""Resampling in blocks against the matrices that say the same, written down in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.synthesis import Augmentation, augment
from kwjax.synthesis.augment import draw_views
from kwjax.synthesis.resample import outside, resample


def matrices(positions: np.ndarray, size: int) -> np.ndarray:
  """f64[v,n,size], row i of which takes from the rows beside position i."""
  return np.maximum(0.0, 1.0 - np.abs(positions[..., None].astype(np.float64) - np.arange(size)))


def views(config: Augmentation, count: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
  """Drawn positions of rows and columns."""
  drawn = draw_views(jax.random.key(0), jnp.arange(count), height, width, config)
  return np.asarray(drawn.rows), np.asarray(drawn.columns)


@pytest.mark.parametrize(
  ("config", "height", "width"),
  [
    (Augmentation(crop_resize=(0.4, 1.0), flip=True), 224, 224),
    (Augmentation(crop_resize=(0.2, 0.3), flip=True), 161, 193),
    (Augmentation(pad_crop=40, flip=True), 160, 129),
    (Augmentation(crop_resize=(0.3, 1.0), pad_crop=9, flip=True), 131, 200),
    (Augmentation(crop_resize=(0.4, 1.0), pad_crop=2, flip=True), 24, 30),
  ],
  ids=["default", "small crops", "shifts", "both", "small images"],
)
def test_views_and_their_gradient_are_products_with_the_matrices(config: Augmentation, height: int, width: int) -> None:
  rows, columns = views(config, 9, height, width)
  x, g = (np.asarray(jax.random.normal(jax.random.key(i), (9, height, width, 3))) for i in (0, 1))
  magnification = config.crop_resize[0] ** -0.5 if config.crop_resize else 1.0

  @jax.jit
  def both(x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    found, transpose = jax.vjp(lambda x: resample(x, rows, columns, magnification), x)
    return found, transpose(g)[0]

  found, gradient = both(x, g)
  down, across = matrices(rows, height), matrices(columns, width)
  np.testing.assert_allclose(found, np.einsum("vij,vkw,vjwc->vikc", down, across, x, optimize=True), atol=2e-5)
  expected = np.einsum("vij,vkw,vikc->vjwc", down, across, g, optimize=True)
  np.testing.assert_allclose(gradient, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("magnification", [1.0, 1.7, 2.0])
def test_all_rows_that_look_at_a_block_are_found(magnification: float) -> None:
  """The bound on the rows that see a block holds at the border too, where positions are held back."""
  size = 140
  position = np.clip((np.arange(size) + 0.5) / magnification - 0.5, 0, size - 1).astype(np.float32)
  rows = np.stack([position, position[::-1], size - 1 - position, (size - 1 - position)[::-1]])
  g = np.asarray(jax.random.normal(jax.random.key(0), (4, size, size, 1)))
  straight = np.tile(np.arange(size, dtype=np.float32), (4, 1))
  transposed = lambda g: jax.vjp(lambda x: resample(x, rows, straight, magnification), jnp.zeros_like(g))[1](g)
  (found,) = jax.jit(transposed)(g)
  expected = np.einsum("vij,vikc->vjkc", matrices(rows, size), g)
  np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_what_is_outside_is_zero() -> None:
  rows = np.full((1, 130), outside(130), np.float32)
  assert not np.asarray(resample(jnp.ones((1, 130, 130, 1)), rows, rows, 1.0)).any()


def test_accelerators_keep_one_product_an_axis() -> None:
  config = Augmentation(crop_resize=(0.4, 1.0), flip=True)
  loss = jax.jit(jax.grad(lambda x: augment(x, jax.random.key(0), config, duplicates=2).sum()))
  traced = loss.trace(jnp.ones((1, 224, 224, 3)))
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert "stablehlo.gather" not in text
  assert "tensor<2x224x224xf32>" in text
  assert "stablehlo.gather" in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_a_first_copy_that_is_kept_and_others_that_are_drawn() -> None:
  x = jax.random.uniform(jax.random.key(2), (2, 130, 140, 3))
  config = Augmentation(crop_resize=(0.5, 0.9), flip=True, keep_first=True)
  copies = jax.jit(lambda x: augment(x, jax.random.key(0), config, duplicates=3))(x)
  np.testing.assert_array_equal(copies[::3], x)
  rows, columns = views(config, 6, 130, 140)
  drawn = np.einsum(
    "vij,vkw,vjwc->vikc", matrices(rows, 130), matrices(columns, 140), np.repeat(x, 3, axis=0), optimize=True
  )
  for i in (1, 2, 4, 5):
    np.testing.assert_allclose(copies[i], drawn[i], atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_gradients_have_the_type_of_the_images(dtype: str) -> None:
  config = Augmentation(crop_resize=(0.5, 0.9))
  with jax.enable_x64(dtype == "float64"):
    x = jnp.ones((1, 130, 130, 3), dtype)
    gradient = jax.grad(lambda x: augment(x, jax.random.key(0), config).astype(jnp.float32).sum())(x)
    assert gradient.dtype == dtype
    np.testing.assert_allclose(np.asarray(gradient, np.float64).sum(), x.size, rtol=2e-2)
