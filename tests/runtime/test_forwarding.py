"""How a set of images is forwarded: in what pieces, in what order, and what is computed of a layer's input."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.errors import Interrupted
from kwjax.models.mobilenet import InvertedResidual
from kwjax.quantization import observe_ranges
from kwjax.quantization.histograms import observe_histograms
from kwjax.runtime.devices import batch_sizes, forwarding
from kwjax.runtime.devices.parallel import DeviceGroup, device_group
from kwjax.runtime.evaluate import predict
from tests.networks import random_network


def forward_all(images: np.ndarray, seen: list[str], **options) -> np.ndarray:
  """Twice every image, with a note of what happens when."""

  def step(factor: jax.Array, batch: jax.Array) -> jax.Array:
    jax.debug.callback(lambda x: seen.append(f"forward {len(x)}"), batch)
    return factor * batch

  parts = []
  for rows in forwarding.forward_rows(step, np.float32(2), images, description="", **options):
    jax.effects_barrier()
    seen.append(f"take {len(rows)}")
    parts.append(rows)
  return np.concatenate(parts)


@pytest.mark.parametrize(
  ("devices", "batch_size", "count", "size"),
  [
    # 4 images a part: as many parts as there are images for, whole ones unless a single one is too much already.
    (1, 64, 8, 8),
    (1, 64, 7, 8),
    (1, 6, 8, 4),
    (1, 3, 7, 3),
    (1, 64, 2, 2),
    (1, 64, 0, 1),
    (4, 64, 160, 64),
    (4, 5, 99, 8),
    (4, 64, 0, 4),
    # At most 4 parts, and of 3 and 4 those that fill the last batch best.
    (1, 64, 32, 16),
    (1, 64, 23, 12),
    (1, 64, 100, 12),
  ],
)
def test_batches_on_cpus_are_of_parts_that_the_cache_holds(
  monkeypatch: pytest.MonkeyPatch, devices: int, batch_size: int, count: int, size: int
) -> None:
  monkeypatch.setattr(batch_sizes, "_PART_PIXELS", 99)
  monkeypatch.setattr(batch_sizes, "_PARTS", 4)
  group = device_group(devices)
  assert batch_sizes.forward_size(group, batch_size, count, (4, 6, 3)) == size
  assert batch_sizes.forward_size(group, 1, 1, (400, 600, 3)) == devices


def test_accelerators_take_batches_whole() -> None:
  group = DeviceGroup((types.SimpleNamespace(platform="gpu", process_index=0),) * 2)
  assert batch_sizes.forward_size(group, 1000, 999, (400, 600, 3)) == 1000
  images = jnp.ones((6, 400, 600, 3))
  assert batch_sizes.in_parts(group, lambda x: x, images) is images


@pytest.mark.parametrize(("count", "size"), [(3, 3), (4, 4), (8, 4), (6, 3), (7, 1), (10, 2)])
def test_parts_of_a_batch_give_the_rows_of_the_whole(monkeypatch: pytest.MonkeyPatch, count: int, size: int) -> None:
  monkeypatch.setattr(batch_sizes, "_PART_PIXELS", 4 * 20)
  images = np.random.default_rng(0).normal(size=(count, 4, 5, 2)).astype(np.float32)
  seen: list[int] = []

  def forward(part: jax.Array) -> dict[str, jax.Array]:
    seen.append(part.shape[0])
    return {"mean": part.mean((1, 2, 3)), "twice": 2 * part}

  found = jax.jit(lambda x: batch_sizes.in_parts(device_group(1), forward, x))(images)
  assert set(seen) == {size}
  np.testing.assert_allclose(found["mean"], images.mean((1, 2, 3)), atol=1e-6)
  np.testing.assert_array_equal(found["twice"], 2 * images)


@pytest.mark.parametrize("devices", [1, 2])
def test_what_is_observed_does_not_depend_on_the_parts(monkeypatch: pytest.MonkeyPatch, devices: int) -> None:
  class Observed(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
      x = InvertedResidual(8, 1, 6, name="first")(x)
      return nn.Dense(3, name="last")(x.mean((1, 2)))

  network = random_network(Observed(), image_shape=(8, 8, 8))
  images = np.random.default_rng(0).random((13, 8, 8, 8), np.float32)
  whole = observe_ranges(network, images, devices=1)
  counts = observe_histograms(network, images, whole, bins=16, devices=1)
  logits = predict(network, images, devices=1)
  monkeypatch.setattr(batch_sizes, "_PART_PIXELS", 2 * 64)
  sizes: list[int] = []
  forward_size = batch_sizes.forward_size
  monkeypatch.setattr(forwarding, "forward_size", lambda *args: sizes.append(forward_size(*args)) or sizes[-1])
  parts = observe_ranges(network, images, devices=devices)
  assert sizes == [14 if devices == 1 else 16], "no batch was of several parts"
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), parts, whole)
  for name, found in observe_histograms(network, images, whole, bins=16, devices=devices).items():
    # A value on an edge may be rounded over it.
    assert found.zeros == counts[name].zeros
    assert np.abs(found.counts - counts[name].counts).sum() <= 4
  np.testing.assert_allclose(predict(network, images, devices=devices), logits, rtol=1e-5, atol=1e-6)


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
