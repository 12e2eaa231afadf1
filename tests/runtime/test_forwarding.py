"""How a set of images is forwarded: in what pieces, in what order, and what is computed of a layer's input."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.cpu import computed_once
from kwjax.errors import Interrupted
from kwjax.models.mobilenet import InvertedResidual
from kwjax.runtime import forwarding
from kwjax.quantization.calibrate import recording_extremes
from kwjax.runtime.parallel import device_group
from tests.networks import random_network


def forward_all(images: np.ndarray, seen: list[str], **options) -> np.ndarray:
  """Twice every image, with a note of what happens when."""

  def forward(factor: jax.Array, batch: jax.Array) -> jax.Array:
    seen.append(f"forward {batch.shape[0]}")
    return factor * batch

  parts = []
  group = device_group(1)
  for found, valid in forwarding.forward_batches(forward, 2.0, images, group, words="", **options):
    seen.append(f"take {int(valid.sum())}")
    parts.append(found[valid])
  return np.concatenate(parts)


def test_cpus_take_no_more_pixels_at_a_time_than_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
  images = np.arange(7 * 4 * 5 * 1, dtype=np.float32).reshape(7, 4, 5, 1)
  for pixels, batch_size, size in ((60, 64, 3), (79, 64, 3), (80, 64, 4), (1, 64, 1), (1000, 2, 2), (1000, 64, 7)):
    monkeypatch.setattr(parallel, "_CPU_PIXELS", pixels)
    seen: list[str] = []
    np.testing.assert_array_equal(forward_all(images, seen, batch_size=batch_size), 2 * images)
    assert {step for step in seen if step.startswith("forward")} == {f"forward {size}"}


def test_the_next_batch_is_under_way_while_the_host_takes_one_in() -> None:
  seen: list[str] = []
  forward_all(np.ones((5, 2, 2, 1), np.float32), seen, batch_size=2)
  assert seen == ["forward 2", "forward 2", "take 2", "forward 2", "take 2", "take 1"]


def test_a_stop_still_hands_over_what_was_forwarded() -> None:
  seen: list[str] = []
  answers = iter([False, True])
  with pytest.raises(Interrupted):
    forward_all(np.ones((9, 2, 2, 1), np.float32), seen, batch_size=2, should_stop=lambda: next(answers))
  assert seen == ["forward 2", "forward 2", "take 2", "take 2"]


def test_a_layer_input_is_what_it_was_bit_by_bit() -> None:
  x = jnp.asarray([0.0, -0.0, 1.5, -jnp.inf, jnp.inf, 1e-42, jnp.nan], jnp.float32)
  found = np.asarray(jax.jit(computed_once)(x))
  np.testing.assert_array_equal(found, x)
  np.testing.assert_array_equal(np.signbit(found[:-1]), np.signbit(x[:-1]))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="it is XLA's CPU backend that computes it several times")
def test_depthwise_convolutions_run_once_beside_what_is_observed_of_them() -> None:
  """Before, XLA ran each of them for the lowest and highest value and once more for the layer behind it."""

  class Two(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
      x = InvertedResidual(8, 1, 6, name="first")(x)
      return InvertedResidual(8, 1, 6, name="second")(x).mean((1, 2))

  network = random_network(Two(), image_shape=(32, 32, 8))
  recording = recording_extremes(network.forward, network)

  def loops_of_nine_products(function) -> int:
    text = jax.jit(function).lower(network.variables, jnp.ones((4, 32, 32, 8))).compile().as_text()
    return sum(body.count(" multiply(") >= 9 for body in re.split(r"\n(?=%|ENTRY)", text))

  plain = loops_of_nine_products(lambda variables, images: network.forward(variables, images)[0])
  assert plain == 2
  assert loops_of_nine_products(recording) == plain
