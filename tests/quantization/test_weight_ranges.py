"""Weight ranges of least squared error: against exhaustive search, as integers, under scan, in files and while training."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.distillation import DistillConfig, distill
from kwjax.errors import RuleError, WeightsError
from kwjax.quantization import (
  WEIGHT_SCHEMES,
  Clip,
  QuantRules,
  Ranges,
  fake_quant,
  integer_weights,
  load_integer_weights,
  load_quantized,
  mse_clip,
  quantize,
  quantize_weights,
  save_quantized,
  weight_clips,
  weight_grid,
)
from kwjax.quantization.weight_ranges import kernel_path

ONE = ("sym", "symfull", "midrise")


def kernel(seed: int = 0) -> jax.Array:
  """Long-tailed, channels of very different scale, one of them of one sign."""
  weights = np.random.default_rng(seed).laplace(size=(3, 3, 8, 6)) * np.array([1, 0.1, 5, 1, 1, 1])
  weights[..., 4] = np.abs(weights[..., 4]) + 0.5
  return jnp.asarray(weights, jnp.float32)


def errors(weights: jax.Array, scheme: str, bits: int, clip: Clip | None = None) -> np.ndarray:
  quantized = fake_quant(weights, *weight_grid(weights, scheme, bits, axes=(0, 1, 2), clip=clip))
  return np.square(np.asarray(weights - quantized, np.float64)).sum((0, 1, 2))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("scheme", sorted(WEIGHT_SCHEMES))
def test_clip_is_as_good_as_exhaustive_search(scheme, bits):
  weights = kernel()
  found = errors(weights, scheme, bits, mse_clip(weights, scheme, bits, axes=(0, 1, 2)))
  cuts = np.linspace(0, 0.48, 25)
  shares = [(cut, cut) for cut in cuts] if scheme in ONE else [(a, b) for a in cuts for b in cuts]
  every = jax.vmap(lambda lo, hi: _errors(weights, scheme, bits, lo, hi))(*jnp.asarray(shares, jnp.float32).T)
  best, whole = np.asarray(every).min(0), errors(weights, scheme, bits)
  assert (found <= whole * (1 + 1e-6)).all()
  assert (found <= best * (1.001 if scheme in ONE else 1.2)).all()
  if bits == 2:
    assert found[:4].sum() < 0.95 * whole[:4].sum()


def _errors(weights, scheme, bits, lo, hi):
  ones = jnp.ones((1, 1, 1, weights.shape[-1]))
  grid = weight_grid(weights, scheme, bits, axes=(0, 1, 2), clip=Clip(lo * ones, hi * ones))
  return jnp.sum(jnp.square(weights - fake_quant(weights, *grid)), (0, 1, 2))


@pytest.mark.parametrize("scheme", sorted(WEIGHT_SCHEMES))
def test_no_clip_is_the_whole_range(scheme):
  weights, none = kernel(), jnp.zeros((1, 1, 1, 6))
  for value, expected in zip(
    weight_grid(weights, scheme, 4, axes=(0, 1, 2), clip=Clip(none, none)),
    weight_grid(weights, scheme, 4, axes=(0, 1, 2)),
    strict=True,
  ):
    np.testing.assert_array_equal(value, expected)


def copy_of(network, weights="affine0", **options):
  rules = QuantRules.parse("3w32a", weights=weights, weights_range="mse", **options)
  return quantize(network, rules, Ranges({}))


@pytest.mark.parametrize("scheme", ["affine0", "symfull", "midrise"])
def test_integers_dequantize_to_what_apply_uses(network, images, scheme):
  student = copy_of(network, scheme)

  @jax.jit
  def used(variables, images):
    def keep(variables, images):
      return images, variables["params"]

    return quantize_weights(keep, network, student.rules, student.clips)(variables, images)[1]

  kernels = used(network.variables, images[:1])
  for name, tensor in integer_weights(student).items():
    np.testing.assert_array_equal(tensor.dequantize(), kernels[name]["kernel"])
  whole = quantize(network, QuantRules.parse("3w32a", weights=scheme), Ranges({}))
  assert any((integer_weights(whole)[n].q != t.q).any() for n, t in integer_weights(student).items())


def test_clips_are_stored_and_damage_is_found(network, images, tmp_path):
  student = copy_of(network, overrides={"stem": "float"})
  assert sorted(student.clips) == ["classifier", "depthwise", "pointwise"]
  save_quantized(student, tmp_path)
  loaded = load_quantized(tmp_path, module=network.module)
  jax.tree.map(np.testing.assert_array_equal, loaded.clips, student.clips)
  np.testing.assert_array_equal(*(jax.jit(lambda n, x: n.apply(x))(n, images) for n in (loaded, student)))
  jax.tree.map(np.testing.assert_array_equal, load_integer_weights(tmp_path), integer_weights(student))
  path = tmp_path / "weight_clips.safetensors"
  payload = bytearray(path.read_bytes())
  payload[-3] ^= 1
  path.write_bytes(payload)
  with pytest.raises(WeightsError, match=r"weight_clips\.safetensors"):
    load_quantized(tmp_path, module=network.module)
  path.unlink()
  with pytest.raises(WeightsError, match=r"weight_clips\.safetensors"):
    load_quantized(tmp_path, module=network.module)
  save_quantized(quantize(network, QuantRules.parse("4w32a"), Ranges({})), tmp_path)
  assert not path.exists()
  assert json.loads((tmp_path / "quantization.json").read_text())["clips_sha256"] is None
  load_quantized(tmp_path, module=network.module)


def test_stacked_kernels_are_searched_one_by_one(stacked_networks):
  rules = QuantRules.parse("3w32a", weights_range="mse")
  unrolled, scan = (weight_clips(stacked_networks[form], rules) for form in ("unrolled", "scan"))
  for index in range(3):
    np.testing.assert_array_equal(scan["blocks/conv"].hi[index], unrolled[f"block{index}/conv"].hi)


def test_shares_stay_while_the_weights_are_trained(network, images):
  student = copy_of(network)
  config = DistillConfig.preset("short", steps=2, batch_size=4, learning_rate=0.05, warmup_steps=0)
  tuned = distill(student, network, np.asarray(images), config, key=jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, tuned.clips, student.clips)
  before, after = (
    np.asarray(v["params"][kernel_path("stem")[0]]["kernel"]) for v in (student.variables, tuned.variables)
  )
  assert (before != after).any()
  scales = [integer_weights(q)["stem"].scale for q in (student, tuned)]
  assert (scales[0] != scales[1]).any()


def test_clips_of_another_network_are_refused(network, make_network):
  rules = QuantRules.parse("4w32a", weights_range="mse")
  clips = weight_clips(network, rules)
  assert weight_clips(network, QuantRules.parse("4w32a")) == {}
  with pytest.raises(RuleError, match=r"missing for 4 layers of tiny: stem"):
    quantize(network, rules, Ranges({}), clips={})
  with pytest.raises(RuleError, match="name other"):
    quantize(network, rules, Ranges({}), clips={**clips, "other": clips["stem"]})
  wrong = {**clips, "stem": Clip(clips["stem"].lo + 0.6, clips["stem"].hi)}
  with pytest.raises(RuleError, match=r"layer stem needs shares in \[0, 0.5\) of shape"):
    quantize(network, rules, Ranges({}), clips=wrong)
