"""Convolutions that are fast on CPUs too: a drop-in for `lax.conv_general_dilated` in `nn.Conv`.

XLA's CPU backend is slow at two kinds that its library kernels do not take. A depthwise convolution runs as scalar code;
the same sum written as k * k shifted multiply-adds becomes one vectorised loop, and its two gradients are written in the
same manner. A dense one of up to 16 channels runs at two thirds of the rate of one with a 17th channel, even one of zeros.
The gradient of dense 3x3 ones to their images takes half the time by Winograd's algorithm.
On GPUs and TPUs the native convolution is kept. The platform is known only when the program is lowered, so the choice is
made there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from kwjax.models import winograd
from kwjax.models.windows import Window, pad_images, scatter_taps, tap_of_padded

_LAYOUT = ("NHWC", "HWIO", "NHWC")
_LARGEST_WINDOW = 49  # one slice a tap: beyond 7x7 the loop is too long to compile
_ROW_BLOCKS = 8  # of the kernel gradient: more make the loop longer to compile and no faster
_NARROW = 16  # channels up to which XLA's CPU backend keeps a dense convolution from its library kernels


def conv_general_dilated(
  lhs: Array,
  rhs: Array,
  window_strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  lhs_dilation: Sequence[int] | None = None,
  rhs_dilation: Sequence[int] | None = None,
  dimension_numbers: Any = None,
  feature_group_count: int = 1,
  batch_group_count: int = 1,
  precision: Any = None,
  preferred_element_type: Any = None,
) -> Array:
  """Same contract as `jax.lax.conv_general_dilated`, with some convolutions made fast on CPUs.

  Depthwise, up to 7x7: y[b,h,w,c] = sum_ij x[b, h s + i - top, w s + j - left, c] k[i,j,0,c], `feature_group_count` =
  channels = features. Dense, stride 1: at most 16 channels and features, or 3x3, whose gradient to the images is Winograd's
  where that pays (precision None; its rounding errors are ten times larger, the value itself is exact as ever).

  Dense, 1x1, without padding: one matrix product, of any type.

  The others are taken for float32 NHWC images, HWIO kernels and no dilation; anything else goes to
  `lax.conv_general_dilated` untouched. They can be differentiated in reverse mode any number of times; forward mode
  (`jax.jvp`) is not defined through them.

  Args:
    lhs: images f32[b,h,w,c].
    rhs: kernel f32[kh,kw,1,c] of a depthwise convolution, f32[kh,kw,c,d] of a dense one.
    window_strides: (rows, columns).
    padding: "SAME", "VALID" or ((top, bottom), (left, right)), in pixels.
    lhs_dilation: as in `lax`.
    rhs_dilation: as in `lax`.
    dimension_numbers: as in `lax`.
    feature_group_count: as in `lax`.
    batch_group_count: as in `lax`.
    precision: as in `lax`; the fast form always computes in float32.
    preferred_element_type: as in `lax`.

  Returns: f32[b,oh,ow,c].
  """
  depthwise = lhs.ndim == 4 and feature_group_count == lhs.shape[3] == rhs.shape[3] > 1
  if _is_pointwise(
    lhs, rhs, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count, batch_group_count
  ):
    down, right = window_strides
    # A matrix product says the same and is what the libraries of every platform are best at, in both gradients too.
    seen = lhs if down == right == 1 else lhs[:, ::down, ::right]
    contraction = (((3,), (0,)), ((), ()))
    return lax.dot_general(seen, rhs[0, 0], contraction, precision, preferred_element_type)
  dense = lhs.ndim == 4 and feature_group_count == 1 and set(window_strides) == {1}
  fast = (
    (depthwise or (dense and (_is_narrow(rhs) or rhs.shape[:2] == (3, 3))))
    and rhs.shape[0] * rhs.shape[1] <= _LARGEST_WINDOW
    and lhs.dtype == rhs.dtype == jnp.float32
    and set(lhs_dilation or (1,)) == {1}
    and set(rhs_dilation or (1,)) == {1}
    and batch_group_count == 1
    and preferred_element_type is None
    and _is_layout(lhs, rhs, dimension_numbers)
  )
  if fast:
    size, stride = (rhs.shape[0], rhs.shape[1]), (window_strides[0], window_strides[1])
    pads = lax.padtype_to_pads(lhs.shape[1:3], size, stride, padding) if isinstance(padding, str) else padding
    window = Window(size, stride, ((pads[0][0], pads[0][1]), (pads[1][0], pads[1][1])))
    if min(*window.padding[0], *window.padding[1]) >= 0 and min(window.output_size(*lhs.shape[1:3])) > 0:
      convolve = _depthwise if depthwise else _dense
      return convolve(*_varying_alike(lhs, rhs), window, precision)
  return lax.conv_general_dilated(
    lhs,
    rhs,
    window_strides,
    padding,
    lhs_dilation=lhs_dilation,
    rhs_dilation=rhs_dilation,
    dimension_numbers=dimension_numbers,
    feature_group_count=feature_group_count,
    batch_group_count=batch_group_count,
    precision=precision,
    preferred_element_type=preferred_element_type,
  )


def _is_pointwise(
  lhs: Array,
  rhs: Array,
  padding: str | Sequence[tuple[int, int]],
  lhs_dilation: Sequence[int] | None,
  rhs_dilation: Sequence[int] | None,
  dimension_numbers: Any,
  feature_group_count: int,
  batch_group_count: int,
) -> bool:
  """Whether it is a 1x1 convolution of NHWC images without padding."""
  return (
    lhs.ndim == 4
    and rhs.shape[:2] == (1, 1)
    and lhs.dtype == rhs.dtype
    and feature_group_count == batch_group_count == 1
    and (isinstance(padding, str) or all(tuple(pads) == (0, 0) for pads in padding))
    and {*(lhs_dilation or (1,)), *(rhs_dilation or (1,))} == {1}
    and _is_layout(lhs, rhs, dimension_numbers)
  )


def _is_layout(lhs: Array, rhs: Array, dimension_numbers: Any) -> bool:
  stated = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
  return stated == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _LAYOUT)


def _varying_axes(array: Array) -> frozenset[str]:
  # The attribute's name changed between releases of jax; outside `jax.shard_map` the set is empty under either.
  kind = jax.typeof(array)
  return kind.mat.varying if hasattr(kind, "mat") else getattr(kind, "vma", frozenset())


def _varying_alike(images: Array, kernel: Array) -> tuple[Array, Array]:
  """Inside `jax.shard_map` a replicated kernel becomes one a device, so that its gradient is summed over devices."""
  axes = _varying_axes(images) | _varying_axes(kernel)

  def cast(array: Array) -> Array:
    missing = tuple(sorted(axes - _varying_axes(array)))
    return lax.pcast(array, missing, to="varying") if missing else array

  return cast(images), cast(kernel)


def _native(images: Array, kernel: Array, window: Window, precision: Any) -> Array:
  return lax.conv_general_dilated(
    images,
    kernel,
    window.stride,
    window.padding,
    dimension_numbers=_LAYOUT,
    feature_group_count=images.shape[3] // kernel.shape[2],
    precision=precision,
  )


def _shifted(images: Array, kernel: Array, window: Window) -> Array:
  """The convolution as a sum over taps of (shifted image) * (kernel tap).

  The image is padded once. Padding each product instead is faster for a layer on its own, but inside a network it makes
  XLA keep 2.5 times the memory for the backward pass and run 1.5 times slower.
  """
  rows, columns = window.output_size(images.shape[1], images.shape[2])
  padded = pad_images(images, window.padding)
  products = [tap_of_padded(padded, window, tap, rows, columns) * kernel[tap][0] for tap in window.taps]
  return functools.reduce(jnp.add, products)


def _shifted_input_gradient(kernel: Array, cotangent: Array, shape: tuple[int, int, int, int], window: Window) -> Array:
  """Transpose of `_shifted` in its images."""
  return scatter_taps(shape, window, (cotangent,), (0.0,), lambda tap, seen: seen[0] * kernel[tap][0])


def _shifted_kernel_gradient(images: Array, cotangent: Array, window: Window) -> Array:
  """Transpose of `_shifted` in its kernel: k'[i,j,0,c] = sum_bhw (tap (i,j) of the images) * cotangent.

  Adding up blocks of rows for every tap inside one loop takes half the time of one reduction a tap, which would write
  each shifted image to memory first. Rows, because the batch may be spread over devices.
  """
  _, rows, columns, channels = cotangent.shape
  height = -(-rows // _ROW_BLOCKS)
  blocks = -(-rows // height)
  missing = blocks * height - rows
  (top, bottom), sides = window.padding
  padded = pad_images(images, ((top, bottom + missing * window.stride[0]), sides))
  cotangent = pad_images(cotangent, ((0, missing), (0, 0))) if missing else cotangent
  per_tap = []
  for tap in window.taps:
    seen = tap_of_padded(padded, window, tap, blocks * height, columns) * cotangent
    sums = functools.reduce(jnp.add, jnp.split(seen, blocks, axis=1))
    per_tap.append(sums[:, :, None])
  return jnp.sum(jnp.concatenate(per_tap, axis=2), axis=(0, 1, 3)).reshape(*window.size, 1, channels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(images: Array, kernel: Array, window: Window, precision: Any) -> Array:
  return lax.platform_dependent(
    images,
    kernel,
    cpu=lambda x, k: _shifted(x, k, window),
    default=lambda x, k: _native(x, k, window, precision),
  )


def _depthwise_forward(
  images: Array, kernel: Array, window: Window, precision: Any
) -> tuple[Array, tuple[Array, Array]]:
  return _depthwise(images, kernel, window, precision), (images, kernel)


def _depthwise_backward(
  window: Window, precision: Any, residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
  # Two choices rather than one: a gradient that nobody asks for is then dropped with its whole branch.
  images, kernel = residuals
  batch, height, width, channels = images.shape
  to_images = lax.platform_dependent(
    kernel,
    cotangent,
    cpu=lambda k, g: _shifted_input_gradient(k, g, (batch, height, width, channels), window),
    default=lambda k, g: jax.linear_transpose(lambda x: _native(x, k, window, precision), images)(g)[0],
  )
  to_kernel = lax.platform_dependent(
    images,
    cotangent,
    cpu=lambda x, g: _shifted_kernel_gradient(x, g, window),
    default=lambda x, g: jax.linear_transpose(lambda k: _native(x, k, window, precision), kernel)(g)[0],
  )
  return to_images, to_kernel


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _is_narrow(kernel: Array) -> bool:
  return max(kernel.shape[2:]) <= _NARROW


def _widened(images: Array, kernel: Array, window: Window, precision: Any) -> Array:
  """A narrow convolution with channels of zeros added, where they cost less than they bring."""
  channels, features = kernel.shape[2:]
  if features < _NARROW // 2 or not _is_narrow(kernel):
    return _native(images, kernel, window, precision)
  if channels >= _NARROW // 2:
    missing = _NARROW + 1 - channels
    images = jnp.pad(images, ((0, 0), (0, 0), (0, 0), (0, missing)))
    return _native(images, jnp.pad(kernel, ((0, 0), (0, 0), (0, missing), (0, 0))), window, precision)
  wide = jnp.pad(kernel, ((0, 0), (0, 0), (0, 0), (0, _NARROW + 8 - features)))  # whole vectors of 8
  return _native(images, wide, window, precision)[..., :features]


def _mirrored(window: Window) -> Window:
  """Geometry of the transpose of a convolution of stride 1, itself a convolution of stride 1."""
  (top, bottom), (left, right) = window.padding
  rows, columns = window.size[0] - 1, window.size[1] - 1
  return Window(window.size, (1, 1), ((rows - top, rows - bottom), (columns - left, columns - right)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dense(images: Array, kernel: Array, window: Window, precision: Any) -> Array:
  return lax.platform_dependent(
    images,
    kernel,
    cpu=lambda x, k: _widened(x, k, window, precision),
    default=lambda x, k: _native(x, k, window, precision),
  )


def _dense_forward(images: Array, kernel: Array, window: Window, precision: Any) -> tuple[Array, tuple[Array, Array]]:
  return _dense(images, kernel, window, precision), (images, kernel)


def _dense_backward(
  window: Window, precision: Any, residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
  images, kernel = residuals

  def mirrored(k: Array, g: Array) -> Array:
    return _dense(g, jnp.swapaxes(k[::-1, ::-1], 2, 3), _mirrored(window), precision)

  if precision is None and winograd.is_worthwhile(images.shape, kernel.shape):
    padding = _mirrored(window).padding
    to_images = lax.platform_dependent(
      kernel, cotangent, cpu=lambda k, g: winograd.transposed_convolve(g, k, padding), default=mirrored
    )
  else:
    to_images = mirrored(kernel, cotangent)
  to_kernel = jax.linear_transpose(lambda k: _native(images, k, window, precision), kernel)(cotangent)[0]
  return to_images, to_kernel


_dense.defvjp(_dense_forward, _dense_backward)
