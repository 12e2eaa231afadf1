"""One step of supervised training: cross-entropy, SGD with momentum, running statistics over all devices; pure."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from kwjax.batchnorm import weigh
from kwjax.distillation.config import warmup_cosine
from kwjax.distillation.step import DistillState, next_state, track_statistics, updated_statistics
from kwjax.errors import KwjaxError
from kwjax.modules import evaluation_arguments, hashable_module
from kwjax.network import Array, Network, Variables
from kwjax.runtime.devices import parallel
from kwjax.sources.plan import Augment
from kwjax.synthesis.augment import Augmentation, augment

TERMS = ("the loss", "the gradient")
"""What a step watches, in the order in which it meets them."""

_WITHOUT_EFFECT = ("log_every", "checkpoint_every", "resident_bytes")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """How a network is trained; loss = cross-entropy.

  Attributes:
    steps: SGD steps.
    batch_size: images a step, over all devices.
    learning_rate: its peak, after the warm-up.
    momentum: of SGD.
    weight_decay: L2 penalty on kernels alone, added to the gradient before the momentum: neither biases nor the scales of
      BatchNorm shrink.
    warmup_steps: steps of linear warm-up; a cosine to zero takes the rest.
    label_smoothing: share of the target that is spread over all classes.
    augmentation: drawn anew for every image in every epoch.
    log_every: steps between two looks at the metrics; the host waits for the devices there only.
    checkpoint_every: steps between checkpoints, where there is a working folder.
    resident_bytes: image sets up to this size are held on the devices (the sum of their copies), larger ones on the host.
  """

  steps: int
  batch_size: int = 128
  learning_rate: float = 0.1
  momentum: float = 0.9
  weight_decay: float = 1e-4
  warmup_steps: int = 0
  label_smoothing: float = 0.0
  augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
  log_every: int = 20
  checkpoint_every: int = 200
  resident_bytes: int = 2 << 30

  def __post_init__(self) -> None:
    for name in ("batch_size", "log_every", "checkpoint_every"):
      if getattr(self, name) < 1:
        raise KwjaxError(f"{name} must be at least 1, found {getattr(self, name)}")
    if self.steps < 0 or not 0 <= self.warmup_steps <= self.steps:
      raise KwjaxError(f"warmup_steps must lie between 0 and steps, found {self.warmup_steps} of {self.steps} steps")
    if not 0.0 < self.learning_rate < float("inf"):
      raise KwjaxError(f"learning_rate must be a positive number, found {self.learning_rate}")
    if not self.weight_decay >= 0.0:
      raise KwjaxError(f"weight_decay must not be negative, found {self.weight_decay}")
    for name in ("momentum", "label_smoothing"):
      if not 0.0 <= getattr(self, name) < 1.0:
        raise KwjaxError(f"{name} must lie in [0, 1), found {getattr(self, name)}")

  @property
  def augment(self) -> Augment | None:
    """`(key, images) -> views`, or None where a view is the image itself."""
    return None if self.augmentation.is_identity else functools.partial(_view, config=self.augmentation)

  def learning_rate_at(self) -> optax.Schedule:
    """Step -> learning rate: that of `warmup_cosine`."""
    return warmup_cosine(self.learning_rate, self.steps, self.warmup_steps)

  def optimizer(self) -> optax.GradientTransformation:
    """SGD: v <- momentum v + g + weight_decay w (kernels only);  w <- w - lr v."""
    sgd = optax.sgd(self.learning_rate_at(), momentum=self.momentum or None)
    return optax.chain(optax.add_decayed_weights(self.weight_decay, mask=_kernels), sgd)

  def replace(self, **changes: Any) -> TrainConfig:
    """A copy with some fields changed."""
    return dataclasses.replace(self, **changes)

  def to_json(self) -> dict[str, Any]:
    """The settings that decide the result."""
    return {name: value for name, value in dataclasses.asdict(self).items() if name not in _WITHOUT_EFFECT}


def _view(key: Array, images: Array, *, config: Augmentation) -> Array:
  return augment(images, key, config)


def _kernels(params: Any) -> Any:
  return flax.traverse_util.path_aware_map(lambda path, _: path[-1] == "kernel", params)


def initial_variables(module: nn.Module, image_shape: tuple[int, int, int], *, key: Array) -> Variables:
  """Random weights as the module's own initializers draw them, in its evaluation mode."""
  image = jnp.zeros((1, *image_shape), jnp.float32)
  options: dict[str, Any] = {**evaluation_arguments(module)}
  return jax.jit(functools.partial(hashable_module(module).init, **options))(key, image)


def train_step(
  state: DistillState[Network],
  images: Array,
  targets: Array,
  config: TrainConfig,
  weights: Array | None = None,
  axis_name: str | None = None,
) -> tuple[DistillState[Network], dict[str, Array]]:
  """Forward and backward with the statistics of the batch over all devices, SGD with momentum, running statistics.

  The module runs in evaluation mode but for its BatchNorm layers: dropout stays off.

  Args:
    state: the network as `student`, the same on every device.
    images: f32[b,h,w,c] in [0,1], this device's share, augmented.
    targets: f32[b,k], one-hot or soft labels.
    config: what to optimize and how.
    weights: f32[b]: 1 counts, 0 is padding, which may be any finite image. None: all count.
    axis_name: mapped axis of the devices.

  Returns:
    The next state and metrics f32[] over all devices: loss, accuracy (of the network before the step, on the augmented
    batch), gradient_norm, learning_rate.
  """
  network = state.student
  share = parallel.weight_share(weights, axis_name)

  def loss_of(params: Any) -> tuple[Array, tuple[Array, Any]]:
    variables = {**network.variables, "params": params}
    forwarded = variables if weights is None else weigh(variables, weights)
    logits, mutated = track_statistics(network.forward, axis_name)(forwarded, images)
    smooth = optax.smooth_labels(targets, config.label_smoothing)
    loss = parallel.weighted_mean(optax.softmax_cross_entropy(logits, smooth), weights)
    # With padding the devices' images do not weigh the same, so the average is taken here, by weight.
    loss = loss if weights is None else parallel.mean(loss, axis_name, share)
    return loss, (logits, updated_statistics(variables.get("batch_stats", {}), mutated))

  params = network.variables["params"]
  (loss, (logits, batch_stats)), gradient = parallel.value_and_grad_of_copy(loss_of, axis_name)(params)
  hits = jnp.argmax(logits, -1) == jnp.argmax(targets, -1)
  accuracy = parallel.mean(parallel.weighted_mean(hits, weights), axis_name, share)
  norm = optax.tree.norm(gradient)
  rate = jnp.asarray(config.learning_rate_at()(state.step), jnp.float32)
  metrics = {"loss": loss, "accuracy": accuracy, "gradient_norm": norm, "learning_rate": rate}
  return next_state(state, config, loss, gradient, batch_stats, (loss, norm)), metrics
