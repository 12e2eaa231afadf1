"""A drop-in for `lax.conv_general_dilated` in `nn.Conv` that is fast on CPUs; what has no fast form goes to `lax` untouched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from kwjax.kernels import takes_fewer_products
from kwjax.kernels.dense import dense
from kwjax.kernels.depthwise import depthwise
from kwjax.kernels.windows import LAYOUT, Window

_LARGEST_WINDOW = 49  # one slice a tap: beyond 7x7 the loop is too long to compile


def conv_general_dilated(
  lhs: Array,
  rhs: Array,
  window_strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  lhs_dilation: Sequence[int] | None = None,
  rhs_dilation: Sequence[int] | None = None,
  dimension_numbers: Any = None,
  feature_group_count: int = 1,
  precision: Any = None,
  **others: Any,
) -> Array:
  """Same contract as `jax.lax.conv_general_dilated`, with some convolutions of NHWC images and HWIO kernels made fast on CPUs.

  1x1 ones without padding, of any type: one matrix product. Float32 ones up to 7x7 without dilation: depthwise ones are sums
  of shifted images (`kwjax.kernels.depthwise`), dense ones have the forms of `kwjax.kernels.dense`. Those are differentiated in
  reverse mode, any number of times; forward mode (`jax.jvp`) is not defined through them.

  Args:
    lhs: images f32[b,h,w,c].
    rhs: kernel f32[kh,kw,c / groups,d].
    window_strides: (rows, columns).
    padding: "SAME", "VALID" or ((top, bottom), (left, right)), in pixels.
    lhs_dilation: as in `lax`.
    rhs_dilation: as in `lax`.
    dimension_numbers: as in `lax`.
    feature_group_count: as in `lax`.
    precision: as in `lax`; depthwise ones always compute in float32.
    others: as in `lax`, which then runs it.

  Returns: f32[b,oh,ow,d].
  """
  is_plain = (
    not others
    and lhs.ndim == 4
    and lhs.dtype == rhs.dtype
    and {*(lhs_dilation or (1,)), *(rhs_dilation or (1,))} == {1}
    and lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    == lax.conv_dimension_numbers(lhs.shape, rhs.shape, LAYOUT)
  )
  if is_plain:
    size, (down, right) = (rhs.shape[0], rhs.shape[1]), window_strides
    pads = lax.padtype_to_pads(lhs.shape[1:3], size, (down, right), padding) if isinstance(padding, str) else padding
    window = Window(size, (down, right), ((pads[0][0], pads[0][1]), (pads[1][0], pads[1][1])))
    edges = {*window.padding[0], *window.padding[1]}
    images, kernel = _varying_alike(lhs, rhs)
    if size == (1, 1) and edges == {0} and feature_group_count == 1:
      return _pointwise(images[:, ::down, ::right], kernel[0, 0], precision)
    fits = size[0] * size[1] <= _LARGEST_WINDOW and min(edges) >= 0 and min(window.output_size(*lhs.shape[1:3])) > 0
    if fits and lhs.dtype == jnp.float32:
      if feature_group_count == lhs.shape[3] == rhs.shape[3] > 1:
        return depthwise(images, kernel, window)
      if feature_group_count == 1:
        return dense(images, kernel, window, precision, takes_fewer_products())
  return lax.conv_general_dilated(
    lhs,
    rhs,
    window_strides,
    padding,
    lhs_dilation=lhs_dilation,
    rhs_dilation=rhs_dilation,
    dimension_numbers=dimension_numbers,
    feature_group_count=feature_group_count,
    precision=precision,
    **others,
  )


def _pointwise(images: Array, kernel: Array, precision: Any) -> Array:
  # As matrices: for the kernel's gradient of arrays XLA's CPU backend would first write the cotangent transposed.
  product = lax.dot(images.reshape(-1, images.shape[3]), kernel, precision=precision)
  return product.reshape(*images.shape[:3], -1)


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
