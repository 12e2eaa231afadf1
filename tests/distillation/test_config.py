"""Settings: schedule and optimizer against closed forms and PyTorch, presets, refusals."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kwjax.distillation import DistillConfig, Mixup
from kwjax.errors import KwjaxError


@pytest.mark.parametrize(("steps", "warmup"), [(50, 0), (50, 7), (50, 50)])
def test_schedule_is_the_formula(steps: int, warmup: int) -> None:
  schedule = DistillConfig(steps, learning_rate=0.2, warmup_steps=warmup).learning_rate_at()
  for t in range(steps):
    if t < warmup:
      expected = 0.2 * (t + 1) / (warmup + 1)
    else:
      expected = 0.1 * (1 + math.cos(math.pi * (t - warmup) / (steps - warmup)))
    np.testing.assert_allclose(schedule(t), expected, rtol=1e-5)


def test_schedule_is_optax_warmup_cosine() -> None:
  schedule = DistillConfig(60, learning_rate=0.1, warmup_steps=9).learning_rate_at()
  reference = optax.warmup_cosine_decay_schedule(0.01, 0.1, 9, 60, 0.0)
  steps = range(61)
  np.testing.assert_allclose([schedule(t) for t in steps], [reference(t) for t in steps], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_optimizer_is_torchs_sgd(nesterov: bool, weight_decay: float) -> None:
  torch = pytest.importorskip("torch")
  config = DistillConfig(8, learning_rate=0.3, warmup_steps=2, nesterov=nesterov, weight_decay=weight_decay)
  start, target = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
  w = torch.tensor(start.copy(), requires_grad=True)
  sgd = torch.optim.SGD([w], lr=1.0, momentum=0.9, nesterov=nesterov, weight_decay=weight_decay)
  x, optimizer = jnp.asarray(start), config.optimizer()
  state = optimizer.init(x)
  for t in range(8):
    sgd.param_groups[0]["lr"] = float(config.learning_rate_at()(t))
    sgd.zero_grad()
    ((w - torch.tensor(target)) ** 2).sum().backward()
    sgd.step()
    updates, state = optimizer.update(jax.grad(lambda v: jnp.sum((v - target) ** 2))(x), state, x)
    x = optax.apply_updates(x, updates)
  np.testing.assert_allclose(x, w.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_presets_are_the_published_settings() -> None:
  cifar, imagenet = DistillConfig.preset("cifar"), DistillConfig.preset("imagenet")
  assert (cifar.steps, cifar.batch_size, cifar.learning_rate, cifar.iq_weight) == (16_000, 256, 0.1, 1e-3)
  assert (imagenet.steps, imagenet.batch_size, imagenet.learning_rate) == (44_000, 256, 0.1)
  assert cifar.mixup == imagenet.mixup == Mixup(lam=0.5)
  assert (cifar.iq_reduction, imagenet.iq_reduction) == ("sum", "mean")
  short = DistillConfig.preset("short", steps=20)
  assert (short.steps, short.learning_rate, short.mixup) == (20, 0.01, None)
  with pytest.raises(KwjaxError, match="unknown preset 'paper'; known: cifar, imagenet, noise, short"):
    DistillConfig.preset("paper")


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"steps": -1}, "warmup_steps must lie between 0 and steps"),
    ({"steps": 5, "warmup_steps": 6}, "found 6 of 5 steps"),
    ({"steps": 5, "batch_size": 0}, "batch_size must be at least 1, found 0"),
    ({"steps": 5, "learning_rate": float("nan")}, "learning_rate must be positive, found nan"),
    ({"steps": 5, "temperature": 0.0}, "temperature must be positive"),
    ({"steps": 5, "iq_weight": -1.0}, "iq_weight must not be negative"),
    ({"steps": 5, "iq_reduction": "max"}, "unknown iq_reduction 'max'; known: mean, sum"),
    ({"steps": 5, "iq_weight": 0.0, "kl_weight": 0.0}, "nothing to learn from"),
    ({"steps": 5, "batch_norm": "eval"}, "unknown batch_norm 'eval'; known: train, frozen"),
  ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
  with pytest.raises(KwjaxError, match=message):
    DistillConfig(**settings)


def brighten(key: jax.Array, images: jax.Array) -> jax.Array:
  return jnp.clip(images + 0.1 * jax.random.uniform(key), 0.0, 1.0)


def test_json_holds_what_decides_the_result() -> None:
  config = DistillConfig(5, mixup=Mixup(alpha=0.2), stages=("a", "b"), augment=brighten)
  stored = json.loads(json.dumps(config.to_json()))
  assert stored["mixup"] == {"lam": 0.5, "alpha": 0.2, "probability": 1.0}
  assert stored["augment"].endswith("brighten")
  assert stored == json.loads(json.dumps(config.replace(log_every=3, checkpoint_every=7).to_json()))
  assert stored != json.loads(json.dumps(config.replace(momentum=0.8).to_json()))
