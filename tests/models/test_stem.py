"""Strided convolutions of RGB images against the native ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from kwjax.kernels import stem
from kwjax.kernels.convolution import conv_general_dilated
from kwjax.kernels.windows import LAYOUT, Window


@pytest.mark.parametrize(
  ("height", "width", "size", "stride", "padding"),
  [
    (16, 16, (3, 3), (2, 2), "SAME"),
    (15, 18, (3, 3), (2, 2), ((1, 1), (1, 1))),
    (9, 14, (3, 4), (1, 3), ((0, 2), (3, 0))),
    (13, 11, (3, 3), (3, 2), "VALID"),
    (7, 7, (2, 5), (2, 2), ((2, 0), (0, 2))),
  ],
)
def test_value_and_gradients_are_those_of_lax(height, width, size, stride, padding) -> None:
  keys = jax.random.split(jax.random.key(0))
  images = jax.random.normal(keys[0], (3, height, width, 3))
  kernel = jax.random.normal(keys[1], (*size, 3, 24)) / 5

  def all_of(function, x, k):
    def loss(x, k):
      y = function(x, k, stride, padding, dimension_numbers=LAYOUT)
      return jnp.sum(jnp.sin(y)), y

    gradients, y = jax.grad(loss, (0, 1), has_aux=True)(x, k)
    return (y, *gradients)

  ours = jax.jit(functools.partial(all_of, conv_general_dilated))
  for found, native in zip(ours(images, kernel), all_of(lax.conv_general_dilated, images, kernel), strict=True):
    np.testing.assert_allclose(found, native, atol=2e-6 * float(jnp.abs(native).max()))
  forward = jax.jit(lambda x, k: conv_general_dilated(x, k, stride, padding, dimension_numbers=LAYOUT))
  texts = {p: forward.trace(images, kernel).lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda")}
  assert {p: text.count("stablehlo.convolution") for p, text in texts.items()} == {"cpu": 0, "cuda": 1}


@pytest.mark.parametrize(
  ("kernel", "stride", "expected"),
  [
    ((3, 3, 3, 32), 2, True),
    ((3, 3, 3, 16), 2, True),
    ((3, 3, 3, 32), 1, False),
    ((7, 7, 3, 64), 2, False),
    ((3, 3, 16, 32), 2, False),
    ((3, 3, 4, 32), 2, False),
    ((3, 3, 1, 32), 2, False),
    ((3, 3, 3, 40), 2, False),
    ((3, 3, 3, 8), 2, False),
  ],
)
def test_where_it_pays(kernel, stride, expected) -> None:
  window = Window(kernel[:2], (stride, stride), ((1, 1), (1, 1)))
  assert stem.is_worthwhile(kernel, window) is expected
