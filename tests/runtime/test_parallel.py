"""One step function on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.errors import KwjaxError
from kwjax.runtime.devices.parallel import (
  axis_offset,
  batch_rows,
  device_group,
  mean,
  padding_weights,
  value_and_grad_of_copy,
  value_and_grad_of_shard,
)

DATA = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)


def spread(x: jax.Array, weights: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
  """A loss that is not a mean over examples: log of the variance of a projection of the whole batch."""
  y = x @ weights
  centre = mean(y.mean(), axis_name)
  return jnp.log(mean(jnp.square(y - centre).mean(), axis_name)), centre


@pytest.mark.parametrize("of", ["shard", "copy"])
def test_gradient_of_a_statistic_of_the_whole_batch(of: str) -> None:
  def step(x: jax.Array, weights: jax.Array, axis_name: str | None) -> tuple:
    if of == "shard":
      return value_and_grad_of_shard(lambda x: spread(x, weights, axis_name), axis_name)(x)
    return value_and_grad_of_copy(lambda w: spread(x, w, axis_name), axis_name)(weights)

  weights, results = jnp.array([1.0, -2.0, 0.5]), []
  for devices in (1, 8):
    group = device_group(devices)
    (loss, centre), gradient = group.compile(step)(group.shard(DATA), group.replicate(weights))
    gradient = group.unshard(gradient) if of == "shard" else group.first(gradient)
    results.append((group.first(loss), group.first(centre), gradient))
  for one, eight in zip(*results, strict=True):
    np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-7)
  # Closed form, so that both cannot be wrong together.
  y = DATA @ np.asarray(weights)
  by_y = 2 * (y - y.mean()) / 16 / y.var()
  expected = by_y[:, None] * np.asarray(weights) if of == "shard" else DATA.T @ by_y
  np.testing.assert_allclose(results[0][2], expected, rtol=1e-4, atol=1e-6)


def test_shard_and_replicate_are_undone() -> None:
  for devices in (1, 4):
    group = device_group(devices)
    np.testing.assert_array_equal(group.unshard(group.shard(DATA)), DATA)
    np.testing.assert_array_equal(group.first(group.replicate(jnp.asarray(DATA))), DATA)


def test_rows_and_weights_of_a_batch_that_does_not_divide() -> None:
  group = device_group(8)
  assert (group.padded(16), group.padded(17), group.padded(3)) == (16, 24, 8)
  assert group.rows(17) == range(24)

  def inside(size: int, axis_name: str | None) -> tuple:
    weights = padding_weights(size, axis_name)
    return batch_rows(size, axis_name), jnp.zeros(0) if weights is None else weights

  for size, rows, weights in (
    (16, range(16), []),
    (3, [0, 1, 2, 2, 2, 2, 2, 2], [1, 1, 1, 0, 0, 0, 0, 0]),
    (9, [*range(9), *[8] * 7], [1] * 9 + [0] * 7),
  ):
    step = group.compile(lambda _, axis_name, size=size: inside(size, axis_name))
    found = map(group.unshard, step(group.replicate(jnp.zeros(()))))
    for values, expected in zip(found, (rows, weights), strict=True):
      np.testing.assert_array_equal(values, expected)
  assert padding_weights(7, None) is None
  np.testing.assert_array_equal(batch_rows(7, None), range(7))


def test_a_copy_for_each_device_does_not_pass_through_one_of_them() -> None:
  group = device_group(4)
  copies = group.replicate({"w": np.arange(6.0, dtype=np.float32), "key": jax.random.key(7)})
  assert copies["w"].shape == (4, 6)
  assert [shard.data.shape for shard in copies["w"].addressable_shards] == [(1, 6)] * 4
  assert {shard.device for shard in copies["w"].addressable_shards} == set(group.devices)
  np.testing.assert_array_equal(jax.random.key_data(group.first(copies["key"])), jax.random.key_data(jax.random.key(7)))


def test_offsets_number_the_examples_of_the_whole_batch() -> None:
  offsets = jax.pmap(lambda x: axis_offset(x.shape[0], "d") + jnp.arange(x.shape[0]), axis_name="d")(np.zeros((8, 2)))
  np.testing.assert_array_equal(offsets.reshape(-1), np.arange(16))
  assert axis_offset(5, None) == 0


def test_impossible_numbers_of_devices_are_refused() -> None:
  with pytest.raises(KwjaxError, match="9 devices were asked for, 8 cpu"):
    device_group(9)
  with pytest.raises(KwjaxError, match="0 devices"):
    device_group(0)
  with pytest.raises(KwjaxError, match="batch of 16 does not divide over 3"):
    device_group(3).shard(DATA)
