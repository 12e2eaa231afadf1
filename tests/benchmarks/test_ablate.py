"""The ablation of the fast forms: each form that it names is really taken out of the program."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from benchmarks import ablate
from kwjax import kernels
from kwjax.kernels import processor
from kwjax.models.layers import MaxPool
from tests.networks import random_network

MODULES = ("convolution", "dense", "depthwise", "im2col", "layers", "pooling", "processor", "windows", "winograd")


class EveryForm(nn.Module):
  """One layer for each form."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Conv(8, (3, 3), 2)(nn.Conv(4, (3, 3))(x))
    x = MaxPool(3, 2, 1)(nn.Conv(8, (3, 3), feature_group_count=8)(x))
    x = nn.Conv(32, (3, 3))(nn.Conv(32, (1, 1))(x))
    return nn.Dense(4)(x.mean((1, 2)))


@pytest.fixture
def untouched() -> Iterator[None]:
  found = {name: importlib.import_module(f"kwjax.kernels.{name}") for name in MODULES}
  before = {name: dict(vars(module)) for name, module in found.items()}
  yield
  for name, module in found.items():
    vars(module).update(before[name])


def program() -> str:
  """The gradient of the network to images and weights, as JAX traces it."""
  network = random_network(EveryForm(), image_shape=(32, 32, 3))

  def loss(variables: dict, images: jax.Array) -> jax.Array:
    with kernels.enabled(True), kernels.fewer_products():
      return network.forward(variables, images)[0].sum()

  return str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(network.variables, jnp.zeros((16, 32, 32, 3))))


@pytest.mark.parametrize("form", sorted({*ablate.FORMS} - {"wide_vectors"}))
def test_a_form_is_taken_out(untouched: None, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
  monkeypatch.setattr("kwjax.kernels.depthwise._CACHED_PART", 1)  # small images fit as a whole
  whole = program()
  ablate.FORMS[form]()
  assert program() != whole


def test_vectors_of_half_the_width_are_asked_for(untouched: None, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  monkeypatch.setattr(processor, "has_wide_vectors", lambda: True)
  assert processor.compiler_options() is not None
  ablate.FORMS["wide_vectors"]()
  assert processor.compiler_options() is None


def test_an_unknown_form_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
  assert ablate.main(["--forms", "magic"]) == 2
  assert "unknown form 'magic'; known: winograd" in capsys.readouterr().err
