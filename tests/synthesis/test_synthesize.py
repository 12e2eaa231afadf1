"""The whole of Algorithm 1: any number of images, resuming, errors, presets."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.analysis.similarity import measure
from kwjax.batchnorm import bns_loss
from kwjax.errors import CheckpointError, Interrupted, KwjaxError, NoBatchNormError, NonFiniteError
from kwjax.runtime.workdir import lock_workdir
from kwjax.synthesis import (
  PAPER_ROWS,
  SCHEMES,
  Augmentation,
  Evidence,
  SynthesisConfig,
  batch_sizes,
  starting_images,
  synthesize,
)
from tests.networks import tiny_network

KEY = jax.random.key(0)


def config(**changes: object) -> SynthesisConfig:
  return SynthesisConfig.for_network("bns", 8).replace(**{"steps": 12, "batch_size": 8, "drops": (), **changes})


@pytest.mark.parametrize(("images", "batch"), [(130, 128), (8, 8), (7, 128), (20, 8), (1, 1)])
def test_batches_are_even_and_cover_the_set(images: int, batch: int) -> None:
  sizes = batch_sizes(images, batch)
  assert sum(sizes) == images
  assert max(sizes) - min(sizes) <= 1
  assert max(sizes) <= batch


def test_images_come_closer_to_the_statistics_than_where_they_started() -> None:
  network = tiny_network()
  samples = synthesize(network, config(steps=30), num_images=12, key=KEY)
  assert samples.images.shape == (12, 8, 8, 3)
  assert samples.images.dtype == np.float32
  assert samples.images.min() >= 0 and samples.images.max() <= 1
  assert samples.history["bns"].shape == (2, 30)
  np.testing.assert_array_equal(np.bincount(samples.labels, minlength=5), [3, 3, 2, 2, 2])
  start = measure(network, starting_images(network, config(), count=6, key=KEY))
  assert measure(network, samples.images).jkl < 0.7 * start.jkl


def test_interrupted_anywhere_it_ends_with_the_same_images(tmp_path: pathlib.Path) -> None:
  network = tiny_network()
  whole = synthesize(network, config(), num_images=12, key=KEY)
  asked = 0

  def stop() -> bool:
    nonlocal asked
    asked += 1
    return asked in (3, 14, 15)

  seen: list[tuple[int, list[float]]] = []
  more = {"should_stop": stop, "callback": lambda batch, curves: seen.append((batch, [*curves["loss"]]))}
  for _ in range(3):
    with pytest.raises(Interrupted, match="its state is in"):
      synthesize(network, config(), num_images=12, key=KEY, workdir=tmp_path, checkpoint_seconds=0, **more)
  resumed = synthesize(network, config(), num_images=12, key=KEY, workdir=tmp_path, **more)
  # Where a run was stopped, every ten steps, and at the end of a batch; always from the first step on.
  assert [(batch, len(loss)) for batch, loss in seen] == [(0, 3), (0, 10), (0, 12), (1, 2), (1, 3), (1, 10), (1, 12)]
  for batch, loss in seen:
    np.testing.assert_array_equal(np.float32(loss), whole.history["loss"][batch, : len(loss)])
  np.testing.assert_array_equal(resumed.images, whole.images)
  np.testing.assert_array_equal(resumed.history["loss"], whole.history["loss"])
  again = synthesize(network, config(), num_images=12, key=KEY, workdir=tmp_path, should_stop=lambda: True)
  np.testing.assert_array_equal(again.images, whole.images)  # nothing was left to do
  assert again.history["seconds"].shape == (2,)
  assert again.history["seconds"].min() > 0


def test_batches_of_different_sizes_and_a_damaged_one_behind_a_stopped_one(tmp_path: pathlib.Path) -> None:
  network, asked = tiny_network(), 0

  def stop() -> bool:
    nonlocal asked
    asked += 1
    return asked == 20

  make = functools.partial(synthesize, network, config(), num_images=13, key=KEY)  # batches of 7 and 6
  whole = make()
  with pytest.raises(Interrupted, match="step 8 of batch 2 of 2"):
    make(workdir=tmp_path, checkpoint_seconds=0, should_stop=stop)
  shard = tmp_path / "images" / "batch-00000.safetensors"
  shard.write_bytes(shard.read_bytes()[:-1])
  np.testing.assert_array_equal(make(workdir=tmp_path, checkpoint_seconds=0).images, whole.images)
  assert not (tmp_path / "checkpoints").exists()


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: pathlib.Path) -> None:
  with lock_workdir(tmp_path), pytest.raises(KwjaxError, match="in use by process"):
    synthesize(tiny_network(), config(), num_images=4, key=KEY, workdir=tmp_path)


def test_a_damaged_batch_is_made_again(tmp_path: pathlib.Path) -> None:
  network = tiny_network()
  whole = synthesize(network, config(), num_images=12, key=KEY, workdir=tmp_path)
  shard = sorted((tmp_path / "images").glob("*.safetensors"))[1]
  shard.write_bytes(shard.read_bytes()[:-100] + b"\1" * 100)
  np.testing.assert_array_equal(
    synthesize(network, config(), num_images=12, key=KEY, workdir=tmp_path).images, whole.images
  )


def test_other_settings_in_the_same_folder_are_refused_by_name(tmp_path: pathlib.Path) -> None:
  network = tiny_network()
  synthesize(network, config(), num_images=4, key=KEY, workdir=tmp_path)
  with pytest.raises(CheckpointError, match=r"learning_rate is 0\.1 there and 0\.2 now"):
    synthesize(network, config(learning_rate=0.2), num_images=4, key=KEY, workdir=tmp_path)
  with pytest.raises(CheckpointError, match="key"):
    synthesize(network, config(), num_images=4, key=jax.random.key(1), workdir=tmp_path)


def test_eight_devices_make_what_one_makes_of_an_odd_number() -> None:
  network = tiny_network()
  single = synthesize(network, config(steps=3, batch_size=16), num_images=11, key=KEY)
  split = synthesize(network, config(steps=3, batch_size=16), num_images=11, key=KEY, devices=8)
  assert split.images.shape == (11, 8, 8, 3)
  np.testing.assert_array_equal(split.labels, single.labels)
  np.testing.assert_allclose(split.history["loss"], single.history["loss"], rtol=1e-4)
  np.testing.assert_allclose(split.images, single.images, atol=1e-4)


def test_a_batch_goes_on_with_another_number_of_devices(tmp_path: pathlib.Path) -> None:
  make = functools.partial(synthesize, tiny_network(), config(), num_images=7, key=KEY)
  asked = iter([False] * 4 + [True])
  with pytest.raises(Interrupted, match="step 5 of batch 1 of 1"):
    make(workdir=tmp_path, devices=4, should_stop=lambda: next(asked))
  np.testing.assert_allclose(make(workdir=tmp_path, devices=1).images, make().images, atol=1e-4)


def test_gaussian_images_are_drawn_not_optimized_and_need_no_batch_norm() -> None:
  network = tiny_network(batch_norm=False)
  samples = synthesize(network, SynthesisConfig.preset("gaussian"), num_images=300, key=KEY)
  np.testing.assert_allclose(samples.images.mean(), 0.45, atol=0.02)
  assert (samples.labels == -1).all()
  assert not np.array_equal(samples.images[0], samples.images[150])
  with pytest.raises(NoBatchNormError):
    synthesize(network, config(), num_images=4, key=KEY)


def test_nan_stops_the_run_with_step_and_layer(tmp_path: pathlib.Path) -> None:
  network = tiny_network()
  network.variables["params"]["bn0"]["bias"] = jnp.full(8, jnp.nan)
  with pytest.raises(NonFiniteError, match=r"batch 1 of 1: .* layer bn1 .* step 0; there is no checkpoint before it"):
    synthesize(network, config(), num_images=4, key=KEY, workdir=tmp_path)
  assert not list((tmp_path / "checkpoints").rglob("[0-9]*/state"))


def test_divergence_in_the_middle_names_the_last_good_checkpoint(tmp_path: pathlib.Path) -> None:
  network, settings = tiny_network(), config(steps=30, learning_rate=0.02)
  curve = synthesize(network, settings, num_images=4, key=KEY).history["jkl"][0]
  # A term that is NaN once J_KL is lower than it ever was up to some step behind the first checkpoint.
  step = next(i for i in range(11, 30) if curve[i] < curve[:i].min())
  limit = (curve[step] + curve[:step].min()) / 2

  def trap(evidence: Evidence) -> jax.Array:
    return jnp.where(bns_loss(evidence.reference, evidence.measured) < limit, jnp.nan, 0.0)

  broken = dataclasses.replace(settings.objective, extra=(("trap", 1.0, trap),))
  with pytest.raises(
    NonFiniteError, match=rf"total loss became NaN .* step {step}; the last good checkpoint is .*/\d0; "
  ):
    synthesize(
      network, settings.replace(objective=broken), num_images=4, key=KEY, workdir=tmp_path, checkpoint_seconds=0
    )


@pytest.mark.parametrize("arch", PAPER_ROWS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_preset_exists_and_is_json(scheme: str, arch: str) -> None:
  settings = SynthesisConfig.preset(scheme, arch).to_json()
  assert settings["scheme"] == scheme


def test_presets_are_appendix_a1() -> None:
  row = SynthesisConfig.preset("bns+inception", "densenet121_imagenet")
  assert (row.batch_size, row.duplicates, row.steps, row.drops) == (200, 2, 10000, (1500, 6000))
  assert (row.objective.bns, row.objective.inception, row.objective.smoothness) == (1.0, 1e-4, 0.0)
  row = SynthesisConfig.preset("inception", "resnet44_cifar10")
  assert (row.batch_size, row.duplicates, row.steps, row.drops) == (800, 4, 1000, (800,))
  assert (row.objective.bns, row.objective.inception, row.objective.smoothness) == (0.0, 1e-3, 1.0)
  assert row.learning_rate == 0.1 and row.betas == (0.9, 0.999)
  schedule = SynthesisConfig.preset("bns", "mobilenet_v2_imagenet").learning_rate_at()
  rates = [float(schedule(step)) for step in (0, 1499, 1501, 4201)]
  np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.001], rtol=1e-5)


@pytest.mark.parametrize(("size", "pad"), [(8, 1), (32, 1), (64, 2)])
def test_default_for_small_images_is_one_gently_moved_view(size: int, pad: int) -> None:
  for scheme in ("bns", "inception", "bns+inception"):
    settings = SynthesisConfig.for_network(scheme, size)
    assert settings.duplicates == 1
    assert settings.augmentation == Augmentation(pad_crop=pad, flip=True)


def test_default_for_large_images_is_their_training_augmentation() -> None:
  settings = SynthesisConfig.for_network("bns", 224)
  assert settings.duplicates == 1
  assert settings.augmentation == Augmentation.training(224) == Augmentation(crop_resize=(0.4, 1.0), flip=True)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: SynthesisConfig.preset("bnss"), "bns, inception"),
    (lambda: SynthesisConfig.preset("bns", "alexnet"), "resnet44_cifar10"),
    (lambda: synthesize(tiny_network(), config(), num_images=0, key=KEY), "at least 1"),
    (lambda: synthesize(tiny_network(), config(), num_images=4, key=KEY, devices=99), "99 devices"),
    (lambda: config(batch_size=0), "batch_size"),
    (lambda: config(init="zeros"), "dead_leaves"),
  ],
)
def test_bad_arguments_get_one_clear_sentence(call: object, message: str) -> None:
  with pytest.raises(KwjaxError, match=message):
    call()
