"""The fast forms against `lax.conv_general_dilated`: value, both gradients, and the transformations they survive."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from kwjax import cpu
from kwjax.kernels import pointwise, products, shifts, winograd
from kwjax.kernels.convolution import conv_general_dilated, fewer_products
from kwjax.kernels.windows import Window, image_parts

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def _operands(shape=(3, 9, 7, 4), size=3, multiplier=1):
  keys = jax.random.split(jax.random.key(0))
  kernel = jax.random.normal(keys[1], (size, size, 1, shape[3] * multiplier))
  return jax.random.normal(keys[0], shape), kernel


def _convolve(function, images, kernel, stride=1, padding="SAME", **options):
  strides = (stride, stride)
  groups = images.shape[-1]
  return function(images, kernel, strides, padding, dimension_numbers=_LAYOUT, feature_group_count=groups, **options)


def _uses_native(images, kernel, **options):
  lowered = jax.jit(functools.partial(_convolve, conv_general_dilated, **options)).lower(images, kernel)
  return "stablehlo.convolution" in lowered.as_text()


def _loss(function, images, kernel, stride=2, padding=((1, 1), (1, 1))):
  return jnp.sum(jnp.sin(_convolve(function, images, kernel, stride, padding)))


@pytest.mark.parametrize(
  ("shape", "size", "stride", "padding"),
  [
    ((2, 9, 7, 4), 3, 1, "SAME"),
    ((2, 9, 7, 4), 3, 1, ((1, 1), (1, 1))),
    ((2, 9, 7, 4), 3, 2, ((1, 1), (1, 1))),
    ((2, 8, 8, 3), 3, 2, "SAME"),
    ((1, 19, 20, 2), 3, 2, "VALID"),
    ((2, 9, 7, 4), 5, 1, ((2, 2), (2, 2))),
    ((2, 9, 7, 4), 5, 2, ((2, 2), (2, 2))),
    ((2, 8, 8, 3), 5, 2, "SAME"),
    ((1, 19, 20, 2), 5, 1, "VALID"),
    ((2, 9, 7, 4), 3, 2, ((0, 1), (2, 0))),
    ((2, 1, 1, 4), 3, 2, ((1, 1), (1, 1))),
    ((2, 1, 1, 4), 5, 1, "SAME"),
    ((2, 2, 3, 2), 5, 2, "SAME"),
    ((1, 19, 20, 2), 3, 4, "VALID"),
    ((8, 9, 7, 4), 3, 1, "SAME"),
    ((6, 19, 20, 2), 5, 2, "SAME"),
    ((5, 9, 7, 4), 3, 1, "SAME"),
  ],
)
def test_equals_the_native_form_in_value_and_both_gradients(shape, size, stride, padding):
  images, kernel = _operands(shape, size)
  cotangent = jax.random.normal(
    jax.random.key(2), _convolve(lax.conv_general_dilated, images, kernel, stride, padding).shape
  )

  def value_and_gradients(function):
    value, vjp = jax.vjp(lambda x, k: _convolve(function, x, k, stride, padding), images, kernel)
    return value, *vjp(cotangent)

  found = jax.jit(value_and_gradients, static_argnums=0)(conv_general_dilated)
  expected = jax.jit(value_and_gradients, static_argnums=0)(lax.conv_general_dilated)
  for ours, native in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours, native, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
  ("batch", "bytes_of_image", "parts"),
  [(8, 3, 2), (8, 4, 4), (8, 99, 4), (64, 1, 8), (6, 1, 2), (9, 1, 3), (7, 1, 1), (3, 1, 1)],
)
def test_a_depthwise_batch_is_divided_into_parts_of_two_images_or_more(batch, bytes_of_image, parts):
  assert image_parts(batch, bytes_of_image, 12, fewest=2, smallest=2) == parts


@pytest.mark.parametrize(("platform", "native"), [("cpu", False), ("cuda", True), ("tpu", True)])
def test_each_platform_is_lowered_to_its_own_form_alone(platform, native):
  gradients = jax.jit(jax.grad(functools.partial(_loss, conv_general_dilated), (0, 1)))
  text = gradients.trace(*_operands()).lower(lowering_platforms=(platform,)).as_text()
  assert text.count("stablehlo.convolution") == (3 if native else 0)  # forward and two gradients


def test_no_choice_is_left_to_run_time():
  gradients = jax.jit(jax.grad(functools.partial(_loss, conv_general_dilated), (0, 1)))
  compiled = gradients.lower(*_operands()).compile().as_text()
  assert "conditional(" not in compiled


def test_the_gradient_of_the_image_alone_computes_no_kernel_gradient():
  image_gradient = jax.jit(jax.grad(functools.partial(_loss, conv_general_dilated)))
  text = image_gradient.trace(*_operands()).lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("stablehlo.convolution") == 2


@pytest.mark.parametrize(
  ("multiplier", "dtype", "options"),
  [
    (2, jnp.float32, {}),
    (1, jnp.bfloat16, {}),
    (1, jnp.float32, {"rhs_dilation": (2, 2)}),
    (1, jnp.float32, {"lhs_dilation": (2, 2), "padding": ((1, 1), (1, 1))}),
    (1, jnp.float32, {"preferred_element_type": jnp.float32}),
    (1, jnp.float32, {"padding": ((-1, 1), (1, 1))}),
  ],
)
def test_what_the_fast_form_does_not_cover_goes_to_lax(multiplier, dtype, options):
  images, kernel = (operand.astype(dtype) for operand in _operands(multiplier=multiplier))
  assert _uses_native(images, kernel, **options)
  expected = _convolve(lax.conv_general_dilated, images, kernel, **options)
  np.testing.assert_array_equal(_convolve(conv_general_dilated, images, kernel, **options), expected)


def test_ordinary_convolutions_go_to_lax():
  images = jnp.ones((1, 5, 5, 4))
  kernel = jnp.ones((3, 3, 4, 6))
  strides, padding = (1, 1), "SAME"
  found = conv_general_dilated(images, kernel, strides, padding, dimension_numbers=_LAYOUT)
  assert found[0, 2, 2, 0] == 36


def test_vmap_over_images_and_over_kernels():
  images, kernel = _operands()
  gradient = jax.grad(functools.partial(_loss, conv_general_dilated), (0, 1))
  expected = jax.grad(functools.partial(_loss, lax.conv_general_dilated), (0, 1))(images, kernel)
  per_image = jax.vmap(gradient, (0, None))(images[:, None], kernel)
  np.testing.assert_allclose(per_image[0][:, 0], expected[0], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(per_image[1].sum(0), expected[1], rtol=1e-4, atol=2e-5)
  doubled = jax.vmap(functools.partial(_convolve, conv_general_dilated), (None, 0))(
    images, jnp.stack([kernel, 2 * kernel])
  )
  np.testing.assert_allclose(doubled[1], 2 * doubled[0], rtol=1e-6)


def test_second_derivatives_and_remat():
  images, kernel = _operands()

  def squared_gradient(function):
    return jax.grad(lambda x: jnp.sum(jax.grad(functools.partial(_loss, function), 1)(x, kernel) ** 2))(images)

  found, expected = squared_gradient(conv_general_dilated), squared_gradient(lax.conv_general_dilated)
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
  plain = jax.grad(functools.partial(_loss, conv_general_dilated))(images, kernel)
  rematerialised = jax.grad(jax.checkpoint(functools.partial(_loss, conv_general_dilated)))(images, kernel)
  np.testing.assert_allclose(rematerialised, plain, rtol=1e-6, atol=1e-6)


def test_maps_over_devices_sum_the_gradient_of_a_shared_kernel():
  images, kernel = _operands((2, 6, 6, 4))
  expected = jax.grad(functools.partial(_loss, lax.conv_general_dilated), (0, 1))(images, kernel)
  gradient = jax.grad(functools.partial(_loss, conv_general_dilated), (0, 1))
  mapped = jax.pmap(gradient, axis_name="devices", in_axes=(0, None), devices=jax.devices()[:1])(images[None], kernel)
  mesh, split, whole = Mesh(np.array(jax.devices()[:1]), ("devices",)), PartitionSpec("devices"), PartitionSpec()
  sharded = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=(split, whole), out_specs=(split, whole)))
  for found in ((mapped[0][0], mapped[1][0]), sharded(images, kernel)):
    for ours, native in zip(found, expected, strict=True):
      np.testing.assert_allclose(ours, native, rtol=1e-4, atol=2e-5)


def test_one_export_for_several_platforms():
  images, kernel = _operands()
  gradient = jax.jit(jax.grad(functools.partial(_loss, conv_general_dilated), (0, 1)))
  exported = jax.export.export(gradient, platforms=("cpu", "cuda", "tpu"))(images, kernel)
  for ours, direct in zip(jax.jit(exported.call)(images, kernel), gradient(images, kernel), strict=True):
    np.testing.assert_allclose(ours, direct, rtol=1e-6, atol=1e-6)


def test_a_flax_layer_takes_it():
  images, _ = _operands()
  options = {"features": 4, "kernel_size": (3, 3), "strides": 2, "padding": "SAME", "feature_group_count": 4}
  ours, native = nn.Conv(**options, conv_general_dilated=conv_general_dilated), nn.Conv(**options)
  variables = native.init(jax.random.key(1), images)
  np.testing.assert_allclose(ours.apply(variables, images), native.apply(variables, images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("channels", "features", "size", "stride", "padding"),
  [
    (16, 16, 3, 1, ((1, 1), (1, 1))),
    (3, 16, 3, 1, "SAME"),
    (16, 3, 3, 1, "SAME"),
    (9, 12, 5, 1, ((2, 1), (0, 2))),
    (16, 8, 1, 1, ((1, 1), (1, 1))),
    (1, 1, 3, 1, "VALID"),
    (16, 16, 3, 2, ((1, 1), (1, 1))),
    (16, 17, 3, 1, "SAME"),
    (3, 20, 7, 2, ((3, 3), (3, 3))),
    (20, 24, 3, 2, ((0, 1), (2, 0))),
    (20, 24, 2, 3, "VALID"),  # leaves rows and columns that no window sees
    (20, 24, 1, 2, ((1, 1), (1, 1))),
  ],
)
def test_dense_convolution_and_its_gradients_are_those_of_lax(channels, features, size, stride, padding):
  keys = jax.random.split(jax.random.key(1))
  images = jax.random.normal(keys[0], (2, 9, 7, channels))
  kernel = 0.1 * jax.random.normal(keys[1], (size, size, channels, features))

  def loss(function, images, kernel):
    return jnp.sum(jnp.sin(function(images, kernel, (stride, stride), padding, dimension_numbers=_LAYOUT)))

  def second_loss(function, images, kernel):
    return jnp.sum(jnp.cos(jax.grad(functools.partial(loss, function))(images, kernel)))

  # Second derivatives take many times as long to compile: once for each way of computing the first.
  for scalar in (loss, second_loss) if size == 3 and features == 16 else (loss,):
    ours, theirs = (
      jax.jit(jax.value_and_grad(functools.partial(scalar, function), (0, 1)))(images, kernel)
      for function in (conv_general_dilated, lax.conv_general_dilated)
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ("channels", "features", "count"), [(16, 16, 2), (3, 16, 4), (16, 3, 8), (12, 8, 4), (9, 9, 1)]
)
def test_narrow_convolutions_are_grouped_on_cpus_and_native_elsewhere(channels, features, count):
  images, kernel = jnp.ones((2, 8, 8, channels)), jnp.ones((3, 3, channels, features))
  convolve = jax.jit(lambda x, k: conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=_LAYOUT))
  traced = convolve.trace(images, kernel)
  grouped = f"3x{2 + count}x{channels}x{count * features}xf32"
  assert grouped in traced.lower(lowering_platforms=("cpu",)).as_text()
  assert (grouped in traced.lower(lowering_platforms=("tpu",)).as_text()) == (count == 1)


@pytest.mark.parametrize("width", [1, 3, 8, 13])
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((0, 2), (1, 0))])
def test_grouped_outputs_are_those_of_lax_at_every_width(width, padding):
  keys = jax.random.split(jax.random.key(5))
  images, kernel = jax.random.normal(keys[0], (2, 6, width + 2, 3)), jax.random.normal(keys[1], (3, 3, 3, 8))
  ours, theirs = (
    function(images, kernel, (1, 1), padding, dimension_numbers=_LAYOUT)
    for function in (conv_general_dilated, lax.conv_general_dilated)
  )
  np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_kernel_gradient_of_a_strided_convolution_is_a_product_on_cpus_alone():
  images, kernel = jnp.ones((2, 9, 12, 3)), jnp.ones((7, 5, 3, 20))

  def gradient(function, kernel):
    convolve = functools.partial(function, images, window_strides=(2, 3), padding="SAME", dimension_numbers=_LAYOUT)
    return jax.grad(lambda k: jnp.sum(jnp.sin(convolve(k))))(kernel)

  ours = jax.jit(functools.partial(gradient, conv_general_dilated))
  np.testing.assert_allclose(ours(kernel), gradient(lax.conv_general_dilated, kernel), rtol=1e-4, atol=1e-4)
  lowered = {name: ours.trace(kernel).lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda")}
  assert {name: text.count("stablehlo.convolution") for name, text in lowered.items()} == {"cpu": 1, "cuda": 2}


@pytest.mark.parametrize("wide_vectors", [True, False])
@pytest.mark.parametrize(("channels", "features"), [(1, 5), (2, 1), (24, 40), (32, 7), (33, 7)])
def test_pointwise_convolution_of_few_channels_is_that_of_lax(monkeypatch, wide_vectors, channels, features):
  monkeypatch.setattr(pointwise, "has_wide_vectors", lambda: wide_vectors)
  keys = jax.random.split(jax.random.key(5))
  images = jax.random.normal(keys[0], (2, 6, 5, channels))
  kernel = jax.random.normal(keys[1], (1, 1, channels, features))

  def value(function, x, k):
    return function(x, k, (2, 1), "VALID", dimension_numbers=_LAYOUT)

  def slope(function, x, k):
    # Of a gradient, so that the derivative of the derivative is there too.
    def loss(x, k):
      return jnp.sum(jnp.sin(value(function, x, k)))

    return jax.grad(lambda x, k: sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1))(x, k)), (0, 1))(x, k)

  ours = jax.jit(functools.partial(value, conv_general_dilated))
  np.testing.assert_allclose(
    ours(images, kernel), value(lax.conv_general_dilated, images, kernel), rtol=1e-5, atol=1e-5
  )
  found = jax.jit(functools.partial(slope, conv_general_dilated))(images, kernel)
  for a, b in zip(found, slope(lax.conv_general_dilated, images, kernel), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(jnp.abs(b).max()))
  lowered = {name: ours.trace(images, kernel).lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda")}
  is_loop = wide_vectors and channels <= 32
  assert {name: "dot_general" in text for name, text in lowered.items()} == {"cpu": not is_loop, "cuda": True}


def test_pointwise_convolution_of_half_floats_is_a_product(monkeypatch):
  monkeypatch.setattr(pointwise, "has_wide_vectors", lambda: True)
  images, kernel = jnp.ones((1, 2, 2, 8), jnp.bfloat16), jnp.ones((1, 1, 8, 4), jnp.bfloat16)
  ours = jax.jit(lambda x, k: conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=_LAYOUT))
  assert ours(images, kernel).dtype == jnp.bfloat16
  assert "dot_general" in ours.lower(images, kernel).as_text()


@pytest.mark.parametrize("wide_vectors", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_pointwise_convolution_never_transposes_the_cotangent(monkeypatch, stride, wide_vectors):
  # A loop over few channels has a gradient of its own, and without it that of the product is to be looked at.
  monkeypatch.setattr(pointwise, "has_wide_vectors", lambda: wide_vectors)
  images, kernel = jnp.ones((2, 6, 10, 8)), jnp.ones((1, 1, 8, 12))

  def gradient(function, images, kernel):
    convolve = functools.partial(function, window_strides=(stride,) * 2, padding="SAME", dimension_numbers=_LAYOUT)
    return jax.grad(lambda x, k: jnp.sum(jnp.sin(convolve(x, k))), (0, 1))(images, kernel)

  ours = jax.jit(functools.partial(gradient, conv_general_dilated))
  for found, expected in zip(ours(images, kernel), gradient(lax.conv_general_dilated, images, kernel), strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  assert f"f32[12,{120 // stride**2}]" not in ours.lower(images, kernel).compile().as_text()


_FEW_TILES = pytest.mark.parametrize(
  ("batch", "height", "width", "padding"), [(20, 8, 8, "SAME"), (8, 9, 14, ((1, 0), (2, 1))), (40, 4, 6, "VALID")]
)


def wide_layer(batch, height, width):
  """Images of 64 channels and a 3x3 kernel of 80 features."""
  keys = jax.random.split(jax.random.key(2))
  return jax.random.normal(keys[0], (batch, height, width, 64)), jax.random.normal(keys[1], (3, 3, 64, 80)) / 24


@_FEW_TILES
def test_with_fewer_products_the_value_is_winograds_and_that_of_lax(batch, height, width, padding):
  images, kernel = wide_layer(batch, height, width)

  def value(precision, x):
    return conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=_LAYOUT, precision=precision)

  @functools.partial(jax.jit, static_argnums=0)
  def fewer(precision, x):
    with fewer_products():
      return value(precision, x)

  exact = lax.conv_general_dilated(images, kernel, (1, 1), padding, dimension_numbers=_LAYOUT)
  found = fewer(None, images)
  assert found.shape == exact.shape
  np.testing.assert_allclose(found, exact, atol=2e-5 * float(jnp.abs(exact).max()))
  programs = {
    "fewer": fewer.trace(None, images).lower(lowering_platforms=("cpu",)),
    "on a GPU": fewer.trace(None, images).lower(lowering_platforms=("cuda",)),
    "exact": fewer.lower("highest", images),
    "afterwards": jax.jit(value, static_argnums=0).lower(None, images),
  }
  assert [name for name, program in programs.items() if "stablehlo.convolution" not in program.as_text()] == ["fewer"]


def test_fewer_products_holds_where_the_derivative_is_traced_later():
  # Of a compiled function the rule of differentiation is traced after the function has returned.
  images, kernel = jnp.ones((4, 8, 8, 32)), jnp.ones((3, 3, 32, 32)) / 288

  @jax.jit
  def compiled(x):
    with fewer_products():
      return conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=_LAYOUT)

  gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(compiled(x)))))
  assert "stablehlo.convolution" not in gradient.trace(images).lower(lowering_platforms=("cpu",)).as_text()


@_FEW_TILES
def test_winograd_gradient_is_that_of_lax(batch, height, width, padding):
  images, kernel = wide_layer(batch, height, width)

  def gradient(function, precision=None):
    def loss(x):
      return jnp.sum(jnp.sin(function(x, kernel, (1, 1), padding, dimension_numbers=_LAYOUT, precision=precision)))

    return jax.jit(jax.grad(loss))

  ours, exact = gradient(conv_general_dilated), gradient(lax.conv_general_dilated)
  np.testing.assert_allclose(ours(images), exact(images), atol=2e-5)
  assert "36x" in ours.lower(images).as_text(), "the gradient was not Winograd's"
  assert "36x" not in gradient(conv_general_dilated, "highest").lower(images).as_text()


@pytest.mark.parametrize(
  ("height", "width", "channels", "features", "padding"),
  [(8, 8, 32, 32, "SAME"), (9, 6, 32, 40, ((1, 0), (2, 1))), (5, 7, 40, 32, "VALID"), (1, 1, 32, 32, ((1, 1), (1, 1)))],
)
@pytest.mark.parametrize(("cached", "tall"), [(1 << 20, False), (1, True)])
def test_winograd_kernel_gradient_is_that_of_lax(monkeypatch, cached, tall, height, width, channels, features, padding):
  monkeypatch.setattr(winograd, "has_wide_vectors", lambda: False)
  # Enough tiles an image that the batch is divided where the cache holds next to nothing.
  monkeypatch.setattr(winograd, "_CACHED_PART", cached)
  height = height + 32 * tall
  keys = jax.random.split(jax.random.key(3))
  images = jax.random.normal(keys[0], (5, height, width, channels))
  kernel = jax.random.normal(keys[1], (3, 3, channels, features)) / 17

  def gradient(function, precision=None):
    def loss(k):
      return jnp.sum(jnp.sin(function(images, k, (1, 1), padding, dimension_numbers=_LAYOUT, precision=precision)))

    return jax.jit(jax.grad(loss))

  ours, exact = gradient(conv_general_dilated), gradient(lax.conv_general_dilated)
  np.testing.assert_allclose(ours(kernel), exact(kernel), atol=2e-5 * float(jnp.abs(exact(kernel)).max()))
  assert "tensor<36x" in ours.trace(kernel).lower(lowering_platforms=("cpu",)).as_text(), (
    "the gradient was not Winograd's"
  )
  assert "tensor<36x" not in ours.trace(kernel).lower(lowering_platforms=("cuda",)).as_text()
  assert "tensor<36x" not in gradient(conv_general_dilated, "highest").lower(kernel).as_text()


@pytest.mark.parametrize(
  # (value and gradient to the images, gradient to the kernel) with AVX2, and with AVX-512
  ("images", "kernel", "expected"),
  [
    ((64, 32, 32, 16), (3, 3, 16, 16), ((False, False), (False, False))),
    ((64, 16, 16, 32), (3, 3, 32, 32), ((True, True), (True, True))),
    ((64, 8, 8, 64), (3, 3, 64, 64), ((True, True), (True, True))),
    ((8, 56, 56, 64), (3, 3, 64, 64), ((True, True), (True, True))),
    ((8, 28, 28, 128), (3, 3, 128, 128), ((True, True), (True, True))),
    ((1, 7, 7, 512), (3, 3, 512, 512), ((False, True), (False, False))),
    ((8, 28, 28, 128), (5, 5, 128, 128), ((False, False), (False, False))),
    ((8, 28, 28, 128), (3, 3, 128, 32), ((False, False), (False, False))),
  ],
)
def test_where_winograd_pays_depends_on_the_vectors(monkeypatch, images, kernel, expected):
  for is_wide, answers in zip((False, True), expected, strict=True):
    monkeypatch.setattr(winograd, "has_wide_vectors", lambda is_wide=is_wide: is_wide)
    assert (winograd.is_worthwhile(images, kernel), winograd.has_fast_kernel_gradient(images, kernel)) == answers


@pytest.mark.parametrize(
  ("shape", "padding"),
  [
    ((2, 7, 7), "SAME"),
    ((1, 9, 6), ((1, 0), (2, 1))),
    ((1, 5, 7), "VALID"),
    ((3, 2, 3), ((2, 3), (3, 2))),
    ((1, 1, 1), "SAME"),
  ],
)
def test_few_pixels_meet_a_large_kernel_in_products(shape, padding):
  keys = jax.random.split(jax.random.key(5))
  images, kernel = jax.random.normal(keys[0], (*shape, 128)), jax.random.normal(keys[1], (3, 3, 128, 136)) / 36

  def value_and_gradients(function, x, k):
    def loss(x, k):
      y = function(x, k, (1, 1), padding, dimension_numbers=_LAYOUT)
      return jnp.sum(jnp.sin(y)), y

    gradients, y = jax.grad(loss, (0, 1), has_aux=True)(x, k)
    return (y, *gradients)

  ours = jax.jit(functools.partial(value_and_gradients, conv_general_dilated))
  expected = jax.jit(functools.partial(value_and_gradients, lax.conv_general_dilated))(images, kernel)
  for found, native in zip(ours(images, kernel), expected, strict=True):
    np.testing.assert_allclose(found, native, atol=1e-5 * float(jnp.abs(native).max()))
  to_images = jax.jit(lambda x: value_and_gradients(conv_general_dilated, x, kernel)[:2])
  texts = {p: to_images.trace(images).lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda")}
  assert texts["cpu"].count("stablehlo.convolution") == 0
  assert texts["cuda"].count("stablehlo.convolution") == 2


@pytest.mark.parametrize(
  ("images", "kernel", "stride", "expected"),
  [
    ((8, 7, 7, 512), (3, 3, 512, 512), 1, True),
    ((8, 14, 14, 256), (3, 3, 256, 256), 1, False),
    ((1, 8, 8, 64), (3, 3, 64, 64), 1, False),
    ((8, 14, 14, 256), (3, 3, 256, 512), 2, False),
    ((1, 7, 7, 512), (5, 5, 512, 512), 1, False),
  ],
)
def test_where_products_pay(images, kernel, stride, expected):
  padding = (kernel[0] // 2,) * 2
  window = Window((kernel[0], kernel[1]), (stride, stride), (padding, padding))
  assert products.is_worthwhile(images, kernel, window) is expected


@pytest.mark.parametrize(
  ("batch", "bytes_of_image", "parts"),
  [(8, 40, 4), (8, 12, 1), (64, 90, 64), (7, 20, 7), (7, 14, 1), (6, 30, 2), (1, 999, 1)],
)
def test_a_batch_is_divided_until_a_part_fits_the_cache(batch, bytes_of_image, parts):
  assert image_parts(batch, bytes_of_image, 100) == parts


@pytest.mark.parametrize(
  ("height", "width", "channels", "features", "padding"),
  [
    (8, 8, 16, 16, "SAME"),
    (9, 6, 5, 24, ((1, 0), (2, 1))),
    (5, 7, 16, 9, "VALID"),
    (2, 3, 4, 4, ((2, 3), (3, 2))),
    (21, 20, 48, 8, "SAME"),  # from here on the cotangent is shifted alone
    (30, 19, 33, 2, ((1, 0), (2, 1))),
    (5, 7, 24, 3, "VALID"),
    (2, 3, 8, 2, ((2, 3), (3, 2))),
  ],
)
@pytest.mark.parametrize("cached", [4 << 20, 130_000])
def test_kernel_gradient_by_shifts_is_that_of_lax(monkeypatch, cached, height, width, channels, features, padding):
  monkeypatch.setattr(shifts, "_CACHED_PART", cached)
  keys = jax.random.split(jax.random.key(4))
  images = jax.random.normal(keys[0], (6, height, width, channels))
  kernel = jax.random.normal(keys[1], (3, 3, channels, features)) / 12

  def gradient(function):
    return jax.jit(
      jax.grad(lambda k: jnp.sum(jnp.sin(function(images, k, (1, 1), padding, dimension_numbers=_LAYOUT))))
    )

  ours, exact = gradient(conv_general_dilated), gradient(lax.conv_general_dilated)
  np.testing.assert_allclose(ours(kernel), exact(kernel), atol=3e-6 * float(jnp.abs(exact(kernel)).max()))
  alone = 2 * features <= channels
  product = f"tensor<{9 * features}x{channels}xf32>" if alone else f"tensor<{3 * channels}x{3 * features}xf32>"
  assert product in ours.trace(kernel).lower(lowering_platforms=("cpu",)).as_text(), "it was not a product of shifts"
  assert product not in ours.trace(kernel).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
  ("images", "kernel", "padding", "stride", "expected"),
  [
    ((64, 32, 32, 16), (3, 3, 16, 16), 1, 1, True),
    ((64, 32, 32, 16), (3, 3, 16, 32), 1, 1, False),
    ((64, 32, 32, 16), (3, 3, 16, 16), 1, 2, False),
    ((64, 32, 32, 16), (5, 5, 16, 16), 2, 1, False),
    ((8, 112, 112, 16), (3, 3, 16, 16), 1, 1, False),
    ((8, 56, 56, 128), (3, 3, 128, 32), 1, 1, True),
    ((8, 14, 14, 128), (3, 3, 128, 32), 1, 1, False),
    ((8, 56, 56, 128), (3, 3, 128, 64), 1, 1, False),
  ],
)
def test_where_shifts_pay(images, kernel, padding, stride, expected):
  window = Window((kernel[0], kernel[1]), (stride, stride), ((padding, padding),) * 2)
  assert shifts.is_worthwhile(images, kernel, window) is expected


@pytest.mark.parametrize(
  ("text", "expected"), [("flags\t\t: fpu avx2 avx512f avx512bw\n", True), ("flags : fpu avx2\n", False), (None, False)]
)
def test_wide_vectors_are_read_off_the_system(tmp_path, monkeypatch, text, expected):
  path = tmp_path / "cpuinfo"
  if text is not None:
    path.write_text("processor : 0\n" + text)
  monkeypatch.setattr(cpu, "_CPUINFO", path)
  assert cpu.has_wide_vectors.__wrapped__() is expected
