"""FGSM against the closed form of a linear classifier, in both spaces, and in batches on several devices."""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from kwjax.analysis.attacks import fgsm, fgsm_images
from kwjax.errors import DataError, KwjaxError
from kwjax.network import Network
from tests.networks import tiny_network


class Linear(nn.Module):
  """Logits that are linear in the pixels."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return nn.Dense(3, name="fc")(x.reshape(x.shape[0], -1))


def linear_network() -> Network:
  variables = Linear().init(jax.random.key(0), np.zeros((1, 2, 2, 3)))
  std = (0.1, 0.2, 0.4)
  return Network(Linear(), variables, image_shape=(2, 2, 3), input_mean=(0.5,) * 3, input_std=std)


def data(count: int, shape: tuple[int, int, int], classes: int) -> tuple[np.ndarray, np.ndarray]:
  x = np.asarray(jax.random.uniform(jax.random.key(1), (count, *shape)))
  return x, np.arange(count) % classes


@pytest.mark.parametrize(("space", "scale"), [("normalized", (0.1, 0.2, 0.4)), ("pixel", (1.0, 1.0, 1.0))])
def test_a_linear_classifier_is_moved_by_the_sign_of_its_gradient(space: str, scale: tuple[float, ...]) -> None:
  network, (x, y) = linear_network(), data(5, (2, 2, 3), 3)
  kernel = np.asarray(network.variables["params"]["fc"]["kernel"])
  error = np.asarray(jax.nn.softmax(network.apply(x))) - np.eye(3)[y]
  direction = np.sign((error @ kernel.T).reshape(x.shape))
  moved = fgsm(network, x, y, 0.3, space=space)  # type: ignore[arg-type]
  np.testing.assert_allclose(moved, x + 0.3 * np.array(scale) * direction, rtol=1e-5, atol=1e-6)
  assert np.max(moved) > 1.0, "not clipped"
  np.testing.assert_allclose(fgsm(network, x, y, 0.3, space=space, clip=True), np.clip(moved, 0, 1))  # type: ignore[arg-type]


def test_the_loss_rises_and_an_image_does_not_depend_on_its_batch() -> None:
  network, (x, y) = tiny_network(), data(6, (8, 8, 3), 5)
  attack = jax.jit(lambda x, y: fgsm(network, x, y, 0.02))
  moved = attack(x, y)
  before, after = (optax.softmax_cross_entropy_with_integer_labels(network.apply(images), y) for images in (x, moved))
  assert np.all(np.asarray(after) > np.asarray(before))
  np.testing.assert_allclose(attack(x[2:3], y[2:3])[0], moved[2], atol=1e-6)


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 4), (3, 5), (8, 128)])
def test_batches_and_devices_do_not_matter(devices: int, batch_size: int) -> None:
  network, (x, y) = tiny_network(), data(11, (8, 8, 3), 5)
  found = fgsm_images(network, x, y, 0.02, batch_size=batch_size, devices=devices)
  assert found.shape == x.shape
  # The sign of a gradient that is zero up to rounding may differ.
  assert np.mean(np.abs(found - np.asarray(jax.jit(fgsm)(network, x, y, 0.02))) > 1e-6) < 1e-3


def test_what_cannot_be_attacked_is_refused() -> None:
  network, (x, y) = tiny_network(), data(4, (8, 8, 3), 5)
  with pytest.raises(KwjaxError, match="'normalized' or 'pixel', found 'raw'"):
    fgsm(network, x, y, 0.1, space="raw")  # type: ignore[arg-type]
  with pytest.raises(DataError, match="below 5, found 0..7"):
    fgsm_images(network, x, [0, 1, 2, 7], 0.1)
  with pytest.raises(DataError, match="at least one image"):
    fgsm_images(network, x[:0], y[:0], 0.1)
