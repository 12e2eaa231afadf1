"""A source that learns: images that are a linear function of noise and label, trained to make two networks disagree."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kwjax.distillation import kl_divergence
from kwjax.runtime.devices import parallel
from kwjax.sources import Batch, Source

Array = jax.Array


class GeneratorState(NamedTuple):
  """Weights f32[latent + classes, pixels] and their optimizer."""

  weights: Array
  optimizer: optax.OptState


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class LinearGenerator(Source[GeneratorState]):
  """Images sigmoid(W [z, onehot(y)]), z ~ N(0, 1); loss: CE(teacher, y) - adversarial KL(teacher || student)."""

  image_shape: tuple[int, int, int]
  num_classes: int
  batch_size: int
  latent: int = 4
  rate: float = 0.05
  adversarial: float = 1.0
  update_every: int = 1

  def init(self, key: Array) -> GeneratorState:
    height, width, channels = self.image_shape
    weights = jax.random.normal(key, (self.latent + self.num_classes, height * width * channels))
    return GeneratorState(weights, optax.adam(self.rate).init(weights))

  def make(self, weights: Array, key: Array, n: int, axis_name: str | None) -> Batch:
    """Images of a state that need not be the current one; gradients pass to the weights."""
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(parallel.batch_rows(n, axis_name))
    noise = jax.vmap(lambda one: jax.random.normal(one, (self.latent,)))(keys)
    labels = jax.vmap(lambda one: jax.random.randint(jax.random.fold_in(one, 1), (), 0, self.num_classes))(keys)
    targets = jax.nn.one_hot(labels, self.num_classes)
    images = jax.nn.sigmoid(jnp.concatenate([noise, targets], axis=1) @ weights)
    return Batch(images.reshape(-1, *self.image_shape), targets)

  def draw(self, state: GeneratorState, key: Array, n: int, axis_name: str | None = None) -> Batch:
    return self.make(state.weights, key, n, axis_name)

  def update(
    self, state: GeneratorState, key: Array, teacher: Any, student: Any, axis_name: str | None = None
  ) -> tuple[GeneratorState, dict[str, Array]]:
    counts = parallel.padding_weights(self.batch_size, axis_name)
    share = parallel.weight_share(counts, axis_name)

    def loss_of(weights: Array) -> tuple[Array, Array]:
      batch = self.make(weights, key, self.batch_size, axis_name)
      expected, found = (network.forward(network.variables, batch.images)[0] for network in (teacher, student))
      apart = kl_divergence(found, expected, weights=counts)
      assert batch.targets is not None
      loss = parallel.weighted_mean(optax.softmax_cross_entropy(expected, batch.targets), counts)
      loss = loss - self.adversarial * apart
      return parallel.mean(loss, axis_name, share) if share is not None else loss, apart

    (loss, apart), gradient = parallel.value_and_grad_of_copy(loss_of, axis_name)(state.weights)
    updates, optimizer = optax.adam(self.rate).update(gradient, state.optimizer)
    metrics = {"loss": loss, "disagreement": parallel.mean(apart, axis_name, share)}
    return GeneratorState(optax.apply_updates(state.weights, updates), optimizer), metrics
