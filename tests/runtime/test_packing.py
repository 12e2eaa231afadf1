"""Packed pytrees: every leaf comes back as it was, and few arrays travel."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.runtime.devices.packing import Packed, pack_constants, pack_rows, unpacked
from kwjax.runtime.devices.parallel import device_group


def _tree():
  rng = np.random.default_rng(0)
  return {
    "kernel": rng.random((3, 3, 64, 32), np.float32),  # 72 KiB: too large to be copied
    "scale": rng.random(32, np.float32),
    "steps": np.arange(6, dtype=np.int32).reshape(2, 3),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "device": jnp.arange(4.0),
  }


def _check(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for leaf, like in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert leaf.shape == like.shape and leaf.dtype == like.dtype
    np.testing.assert_array_equal(leaf, like)


def test_constants_come_back_and_the_small_ones_share_an_array_a_type():
  tree = _tree()
  packed = pack_constants(tree)
  # The large kernel, the array that is on a device, and one each of float32 and int32.
  assert len(packed.arrays) == 4
  assert packed.arrays[0] is tree["device"] and packed.arrays[1] is tree["kernel"]
  _check(packed.unpack(), tree)


def test_rows_come_back_from_a_jitted_program_as_views():
  rows = {"a": jnp.arange(12.0).reshape(4, 3), "b": (jnp.arange(4.0), jnp.arange(4) * 2)}
  packed = jax.jit(pack_rows)(rows)
  assert [array.shape for array in packed.arrays] == [(4, 4), (4, 1)]
  host = jax.tree.map(np.asarray, packed)
  _check(host.unpack(), rows)
  assert np.shares_memory(host.unpack()["a"], host.arrays[0])


def test_only_packed_nodes_are_unpacked():
  assert unpacked({"x": 1, "y": pack_rows([np.ones((2, 1), np.float32)])})["x"] == 1
  assert isinstance(unpacked([pack_constants(_tree())])[0], dict)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_compiled_step_sees_what_was_packed(devices):
  tree, group = _tree(), device_group(devices)
  placed = group.replicate_constants(tree)
  assert isinstance(placed, Packed)

  def step(constants, x, axis_name):
    return x + constants["scale"][:4] * constants["kernel"][0, 0, 0, 0] + constants["steps"][1, 2]

  x = np.zeros((2, 4), np.float32)
  found = group.unshard(group.compile(step)(placed, group.shard(x)))
  expected = tree["scale"][:4] * tree["kernel"][0, 0, 0, 0] + 5
  np.testing.assert_allclose(found, np.stack([expected, expected]), rtol=1e-6)


def test_alike_dataclasses_do_not_share_a_program():
  @jax.tree_util.register_dataclass
  @dataclasses.dataclass(frozen=True)
  class Plain:
    weight: np.ndarray

    def apply(self, x):
      return x * self.weight

  @jax.tree_util.register_dataclass
  @dataclasses.dataclass(frozen=True)
  class Negated(Plain):
    def apply(self, x):
      return -x * self.weight

  group, x = device_group(1), np.ones(3, np.float32)
  step = group.compile(lambda network, x, axis_name: network.apply(x))
  found = [step(group.replicate_constants(kind(2 * x)), x) for kind in (Plain, Negated)]
  np.testing.assert_array_equal(found, [[2, 2, 2], [-2, -2, -2]])
