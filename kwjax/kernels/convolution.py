"""Convolutions that are fast on CPUs too: a drop-in for `lax.conv_general_dilated` in `nn.Conv`.

Depthwise ones are sums of shifted images (`kwjax.kernels.depthwise`), 1x1 ones matrix products or, of few channels, loops
(`kwjax.kernels.pointwise`), and dense ones have forms of their own (`kwjax.kernels.dense`).
On GPUs and TPUs the native convolution is kept. The platform is known only when the program is lowered, so the choice is
made there.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from kwjax.kernels.dense import dense, is_narrow
from kwjax.kernels.depthwise import depthwise
from kwjax.kernels.pointwise import pointwise
from kwjax.kernels.windows import LAYOUT, Window

_FEWER_PRODUCTS = contextvars.ContextVar("fewer_products", default=False)
_LARGEST_WINDOW = 49  # one slice a tap: beyond 7x7 the loop is too long to compile


@contextlib.contextmanager
def fewer_products() -> Iterator[None]:
  """Inside, wide 3x3 convolutions are Winograd's on CPUs where that pays: up to twice as fast, and rounded ten times as much.

  Errors are about 1e-5 of a layer's largest output, a hundredth of those of the TF32 that GPUs multiply in by default. For
  work that averages over images or takes small steps; what a network answers is computed without it.

  It counts while a function is traced: enter it inside the function that is compiled, because `jax.jit` does not know it.
  A convolution with another precision than None stays exact.
  """
  token = _FEWER_PRODUCTS.set(True)
  try:
    yield
  finally:
    _FEWER_PRODUCTS.reset(token)


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
  channels = features. Dense, stride 1: at most 16 channels and features, or 3x3, whose gradients are Winograd's
  where that pays (precision None; its rounding errors are ten times larger, the value itself is that of `lax` but under
  `fewer_products`). Dense, strided, up to 7x7: the gradient to the kernel is a matrix product, and the value a loop of its
  own for images of three channels (`kwjax.kernels.stem`).

  Dense, 1x1, without padding: one matrix product, of any type; float32 ones of few channels one loop.

  The others are taken for float32 NHWC images, HWIO kernels and no dilation; anything else goes to
  `lax.conv_general_dilated` untouched. They and the loop can be differentiated in reverse mode any number of times; forward
  mode (`jax.jvp`) is not defined through them.

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
  is_depthwise = lhs.ndim == 4 and feature_group_count == lhs.shape[3] == rhs.shape[3] > 1
  if _is_pointwise(
    lhs, rhs, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count, batch_group_count
  ):
    down, right = window_strides
    seen = lhs if down == right == 1 else lhs[:, ::down, ::right]
    # As matrices: for the kernel's gradient of arrays XLA's CPU backend would first write the cotangent transposed.
    pixels = seen.reshape(-1, seen.shape[3])
    images, kernel = _varying_alike(pixels, rhs[0, 0])
    return pointwise(images, kernel, precision, preferred_element_type).reshape(*seen.shape[:3], -1)
  is_plain = lhs.ndim == 4 and feature_group_count == 1
  is_strided = set(window_strides) != {1}
  fast = (
    (is_depthwise or (is_plain and (is_strided or is_narrow(rhs) or rhs.shape[:2] == (3, 3))))
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
      images, kernel = _varying_alike(lhs, rhs)
      if is_depthwise:
        return depthwise(images, kernel, window, precision)
      return dense(images, kernel, window, precision, _FEWER_PRODUCTS.get())
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
  return stated == lax.conv_dimension_numbers(lhs.shape, rhs.shape, LAYOUT)


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
