"""The convolutions that layers take on CPUs against `lax.conv_general_dilated`: value, both gradients, what maps them."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from kwjax.kernels import fewer_products, im2col, winograd
from kwjax.kernels.convolution import conv_general_dilated
from kwjax.kernels.depthwise import depthwise
from kwjax.kernels.windows import LAYOUT, Window, native_convolution

UNEVEN = ((1, 0), (2, 1))


def operands(images, kernel):
  keys = jax.random.split(jax.random.key(0))
  return jax.random.normal(keys[0], images), jax.random.normal(keys[1], kernel) / math.sqrt(math.prod(kernel[:3]))


def convolve(function, images, kernel, stride=1, padding="SAME", groups=1, **options):
  strides = (stride, stride)
  return function(images, kernel, strides, padding, dimension_numbers=LAYOUT, feature_group_count=groups, **options)


@functools.partial(jax.jit, static_argnames=("function", "stride", "padding", "groups"))
def value_and_gradients(function, images, kernel, **options):
  value, vjp = jax.vjp(functools.partial(convolve, function, **options), images, kernel)
  return value, *vjp(jnp.sin(value + 1.0))


def compare(found, expected, tolerance=3e-6):
  for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, atol=tolerance * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize(
  ("images", "kernel", "stride", "padding", "groups"),
  [
    # depthwise
    ((3, 9, 7, 4), (3, 3, 1, 4), 1, "SAME", 4),
    ((2, 9, 7, 4), (3, 3, 1, 4), 2, ((0, 1), (2, 0)), 4),
    ((2, 8, 8, 3), (5, 5, 1, 3), 2, "SAME", 3),
    ((1, 19, 20, 2), (3, 3, 1, 2), 4, "VALID", 2),
    ((2, 1, 1, 4), (5, 5, 1, 4), 1, "SAME", 4),
    ((8, 9, 7, 4), (3, 3, 1, 4), 1, "SAME", 4),
    # 1x1
    ((2, 6, 5, 24), (1, 1, 24, 7), 2, "VALID", 1),
    ((2, 6, 5, 3), (1, 1, 3, 7), 1, ((1, 1), (1, 1)), 1),
    # few channels: neighbouring outputs as features
    ((2, 9, 7, 16), (3, 3, 16, 16), 1, UNEVEN, 1),
    ((2, 9, 8, 3), (3, 3, 3, 16), 1, "SAME", 1),
    ((2, 6, 13, 9), (5, 5, 9, 12), 1, ((2, 1), (0, 2)), 1),
    ((2, 6, 3, 1), (3, 3, 1, 1), 1, "VALID", 1),
    # few features, many channels, and the other way round
    ((2, 21, 20, 48), (3, 3, 48, 8), 1, "SAME", 1),
    ((2, 21, 20, 8), (3, 3, 8, 48), 1, UNEVEN, 1),
    # strided
    ((2, 13, 14, 3), (7, 7, 3, 20), 2, ((3, 3), (3, 3)), 1),
    ((2, 9, 7, 20), (2, 2, 20, 24), 3, "VALID", 1),  # leaves rows and columns that no window sees
    ((2, 9, 7, 20), (1, 1, 20, 24), 2, ((1, 1), (1, 1)), 1),
    # few pixels, a large kernel
    ((2, 3, 4, 128), (3, 3, 128, 136), 1, UNEVEN, 1),
    ((1, 1, 1, 128), (3, 3, 128, 128), 1, "SAME", 1),
    # beyond a pixel's reach
    ((2, 9, 7, 5), (3, 3, 5, 24), 1, ((3, 4), (4, 3)), 1),
    # what has no fast form
    ((2, 9, 7, 4), (3, 3, 1, 8), 1, "SAME", 4),
    ((2, 9, 7, 4), (3, 3, 2, 6), 1, "SAME", 2),
    ((2, 9, 7, 4), (3, 3, 4, 6), 1, ((-1, 1), (1, 1)), 1),
    ((1, 9, 9, 2), (8, 8, 2, 3), 1, "SAME", 1),
    ((2, 9, 7, 20), (5, 5, 20, 24), 1, "SAME", 1),
  ],
)
def test_value_and_both_gradients_are_those_of_lax(images, kernel, stride, padding, groups):
  options = {"stride": stride, "padding": padding, "groups": groups}
  found, expected = (
    value_and_gradients(function, *operands(images, kernel), **options)
    for function in (conv_general_dilated, lax.conv_general_dilated)
  )
  compare(found, expected)


WIDE = pytest.mark.parametrize(
  ("images", "kernel", "padding"),
  [
    ((8, 8, 8, 32), (3, 3, 32, 48), "SAME"),
    ((5, 9, 14, 40), (3, 3, 40, 32), UNEVEN),
    ((20, 4, 6, 32), (3, 3, 32, 32), "VALID"),
  ],
)


@WIDE
def test_wide_layers_are_those_of_lax_to_a_hundred_thousandth(images, kernel, padding):
  expected = value_and_gradients(lax.conv_general_dilated, *operands(images, kernel), padding=padding)
  exact = value_and_gradients(conv_general_dilated, *operands(images, kernel), padding=padding)
  with fewer_products():
    found = value_and_gradients(conv_general_dilated, *operands(images, kernel), padding=padding)
  np.testing.assert_array_equal(exact[0], expected[0])
  compare(exact, expected, 2e-5)
  compare(found, expected, 2e-5)
  # Rounded otherwise, so it is another sum.
  assert (found[0] != exact[0]).any()


@WIDE
def test_a_stated_precision_is_kept(images, kernel, padding):
  options = {"padding": padding, "precision": "highest"}
  with fewer_products():
    found = jax.jit(functools.partial(convolve, conv_general_dilated, **options))(*operands(images, kernel))
  np.testing.assert_array_equal(found, convolve(lax.conv_general_dilated, *operands(images, kernel), **options))


@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), UNEVEN, ((0, 0), (0, 0))])
@pytest.mark.parametrize("cached", [1 << 20, 1])
def test_each_form_computes_what_it_says(monkeypatch, padding, cached):
  """The forms by themselves: which one a layer takes depends on sizes and on the processor."""
  for module in (winograd, im2col):
    monkeypatch.setattr(module, "_CACHED_PART", cached)  # of which the small one divides the batch
  window, strided = Window((3, 3), (1, 1), padding), Window((3, 3), (2, 3), padding)
  images, kernel = operands((6, 9, 6, 8), (3, 3, 8, 4))
  single = jax.random.normal(jax.random.key(3), (3, 3, 1, 8))

  @functools.partial(jax.jit, static_argnums=0)
  def native(window, kernel):
    value, vjp = jax.vjp(lambda x, k: native_convolution(x, k, window, None), images, kernel)
    return value, *vjp(jnp.cos(value))

  @jax.jit
  def forms():
    def depthwise_gradients():
      value, vjp = jax.vjp(lambda x, k: depthwise(x, k, strided), images, single)
      return value, *vjp(jnp.cos(value))

    g, of_strided = jnp.cos(native(window, kernel)[0]), jnp.cos(native(strided, kernel)[0])
    wide = (
      winograd.convolve(images, kernel, padding),
      winograd.transposed_convolve(g, kernel, window.mirrored.padding),
      winograd.kernel_gradient(images, g, padding),
    )
    product = im2col.kernel_gradient(images, g, window, None)
    return wide, product, im2col.kernel_gradient(images, of_strided, strided, None), depthwise_gradients()

  wide, product, of_strided, of_single = forms()
  compare(wide, native(window, kernel), 2e-5)
  compare(product, native(window, kernel)[2])
  compare(of_strided, native(strided, kernel)[2])
  compare(of_single, native(strided, single))


@pytest.mark.parametrize(
  ("dtype", "options"),
  [
    (jnp.bfloat16, {}),
    (jnp.float32, {"rhs_dilation": (2, 2)}),
    (jnp.float32, {"lhs_dilation": (2, 2), "padding": ((1, 1), (1, 1))}),
    (jnp.float32, {"preferred_element_type": jnp.float32}),
  ],
)
@pytest.mark.parametrize(("kernel", "groups"), [((3, 3, 1, 4), 4), ((3, 3, 4, 6), 1), ((1, 1, 4, 6), 1)])
def test_other_types_dilation_and_options_are_those_of_lax(kernel, groups, dtype, options):
  images, kernel = (operand.astype(dtype) for operand in operands((2, 9, 7, 4), kernel))
  found, expected = (
    convolve(function, images, kernel, groups=groups, **options)
    for function in (conv_general_dilated, lax.conv_general_dilated)
  )
  assert found.dtype == expected.dtype
  np.testing.assert_allclose(found, expected, rtol=1e-2 if dtype == jnp.bfloat16 else 1e-6, atol=1e-6)


LAYERS = pytest.mark.parametrize(("kernel", "groups"), [((3, 3, 1, 4), 4), ((3, 3, 4, 6), 1), ((1, 1, 4, 6), 1)])


def loss(function, groups, images, kernel):
  return jnp.sum(jnp.sin(convolve(function, images, kernel, 2, "SAME", groups)))


@LAYERS
def test_vmap_over_images_and_over_kernels(kernel, groups):
  images, kernel = operands((3, 6, 7, 4), kernel)
  gradient = jax.grad(functools.partial(loss, conv_general_dilated, groups), (0, 1))
  expected = jax.jit(jax.grad(functools.partial(loss, lax.conv_general_dilated, groups), (0, 1)))(images, kernel)
  by_image = jax.jit(jax.vmap(gradient, (0, None)))(images[:, None], kernel)
  compare((by_image[0][:, 0], by_image[1].sum(0)), expected)
  by_kernel = jax.vmap(lambda k: convolve(conv_general_dilated, images, k, groups=groups))
  doubled = jax.jit(by_kernel)(jnp.stack([kernel, 2 * kernel]))
  compare(doubled[1], 2 * doubled[0])


@LAYERS
def test_second_derivatives_and_remat(kernel, groups):
  images, kernel = operands((2, 6, 7, 4), kernel)

  def slope(function):
    # Of a gradient, so that the derivative of either derivative is there.
    of = jax.grad(jax.checkpoint(functools.partial(loss, function, groups)), (0, 1))
    return jax.jit(jax.grad(lambda x, k: sum(jnp.sum(g**2) for g in of(x, k)), (0, 1)))(images, kernel)

  compare(slope(conv_general_dilated), slope(lax.conv_general_dilated), 1e-5)


@LAYERS
def test_maps_over_devices_sum_the_gradient_of_a_shared_kernel(kernel, groups):
  images, kernel = operands((4, 6, 6, 4), kernel)
  expected = jax.jit(jax.grad(functools.partial(loss, lax.conv_general_dilated, groups), (0, 1)))(images, kernel)
  gradient = jax.grad(functools.partial(loss, conv_general_dilated, groups), (0, 1))
  devices = jax.devices()[:2] if len(jax.devices()) > 1 else jax.devices()[:1]
  by_device = images.reshape(len(devices), -1, *images.shape[1:])
  mapped = jax.pmap(gradient, axis_name="devices", in_axes=(0, None), devices=devices)(by_device, kernel)
  compare((mapped[0].reshape(images.shape), mapped[1].sum(0)), expected)
  mesh, split, whole = Mesh(np.array(devices), ("devices",)), PartitionSpec("devices"), PartitionSpec()
  sharded = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=(split, whole), out_specs=(split, whole)))
  compare(sharded(images, kernel), expected)
