"""J_KL against NumPy on a small network, and against an independent implementation's figures on real ones."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwjax.analysis.similarity import measure, owned_by_outliers
from kwjax.batchnorm import gaussian_kl, observe, reference_moments, trimmed_jkl
from kwjax.errors import DataError, Interrupted, NoBatchNormError
from kwjax.network import Network
from kwjax.synthesis import Augmentation, augment
from tests.networks import tiny_network
from weights_conversion.convert import convert


def images(count: int) -> np.ndarray:
  return np.asarray(jax.random.uniform(jax.random.key(0), (count, 8, 8, 3)))


def test_jkl_is_the_formula_on_the_moments_of_the_whole_set() -> None:
  network, x = tiny_network(), images(23)
  reference, (_, measured) = reference_moments(network), observe(network, x)
  by_layer = {}
  for layer, (mean, var) in reference.items():
    m, v = (np.asarray(a, np.float64) for a in measured[layer])
    by_layer[layer] = np.log(np.sqrt(v / var)) - 0.5 * (1 - (var + (mean - m) ** 2) / v)
  similarity = measure(network, x, batch_size=10)  # the last batch is smaller
  for layer, expected in by_layer.items():
    np.testing.assert_allclose(similarity.per_layer[layer], expected, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(similarity.jkl, np.mean([v.mean() for v in by_layer.values()]), rtol=1e-4)
  assert similarity.count == 23


def test_how_the_set_is_cut_does_not_matter() -> None:
  network, x = tiny_network(), images(12)
  whole, parts = measure(network, x), measure(network, iter([x[:5], x[5:6], x[6:]]))
  np.testing.assert_allclose(parts.jkl, whole.jkl, rtol=1e-5)


@pytest.mark.parametrize(("devices", "batch_size"), [(3, 256), (8, 9)])
def test_several_devices_give_what_one_gives(devices: int, batch_size: int) -> None:
  network, x = tiny_network(), images(23)
  one, several = measure(network, x), measure(network, x, devices=devices, batch_size=batch_size)
  assert several.count == 23
  np.testing.assert_allclose(several.jkl, one.jkl, rtol=1e-5)
  for layer, expected in one.per_layer.items():
    np.testing.assert_allclose(several.per_layer[layer], expected, rtol=1e-4, atol=1e-6)


def test_fewer_images_than_devices_count_too() -> None:
  network, x = tiny_network(), images(3)
  np.testing.assert_allclose(measure(network, x, devices=8).jkl, measure(network, x).jkl, rtol=1e-5)


def test_it_stops_between_batches() -> None:
  with pytest.raises(Interrupted):
    measure(tiny_network(), images(4), should_stop=lambda: True)


def test_input_counts_as_a_layer_when_asked() -> None:
  network, x = tiny_network(), images(12)
  similarity = measure(network, x, include_input=True)
  assert list(similarity.per_layer) == ["input", "bn0", "bn1"]
  means = similarity.layer_means()
  np.testing.assert_allclose(similarity.jkl, np.mean(list(means.values())), rtol=1e-5)


def test_a_few_channels_that_hardly_fire_do_not_own_the_trimmed_value() -> None:
  network, x = tiny_network(), images(16)
  honest = measure(network, x)
  assert honest.outliers() == 0
  assert honest.trimmed() == pytest.approx(float(honest.jkl), rel=1e-6)
  statistics = network.variables["batch_stats"]
  strange = {**statistics["bn1"], "mean": statistics["bn1"]["mean"].at[3].set(1e4)}
  network = network.replace(variables={**network.variables, "batch_stats": {**statistics, "bn1": strange}})
  found = measure(network, x)
  assert (found.outliers(), found.channels()) == (1, 24)
  assert found.jkl > 1e3
  others = np.delete(honest.per_layer["bn1"], 3)
  by_hand = (honest.per_layer["bn0"].mean(dtype=np.float64) + others.mean(dtype=np.float64)) / 2
  assert found.trimmed() == pytest.approx(by_hand, rel=1e-4)
  reference, (_, measured) = reference_moments(network), observe(network, x)
  divergences = {name: gaussian_kl(reference[name], measured[name]) for name in reference}
  assert float(jax.jit(trimmed_jkl)(divergences)) == pytest.approx(by_hand, rel=1e-4)
  assert not owned_by_outliers(float(honest.jkl), honest.trimmed())
  assert owned_by_outliers(float(found.jkl), found.trimmed())


def test_nothing_to_measure_is_refused() -> None:
  with pytest.raises(DataError, match="at least one image"):
    measure(tiny_network(), images(1)[:0])
  with pytest.raises(NoBatchNormError):
    measure(tiny_network(batch_norm=False), images(1))


# Figures of an independent PyTorch implementation on the same weights and images; BatchNorm in evaluation mode.


@functools.cache
def real_network(folder: pathlib.Path, arch: str) -> Network:
  (path,) = (folder / "weights").glob(f"{arch}-*.th")
  return convert(arch, path)


def cifar(folder: pathlib.Path, split: str) -> np.ndarray:
  return np.load(folder / "cifar10" / "cifar10_subset.npz")[f"{split}_images"].astype(np.float32) / 255


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "expected"), [("resnet20", 0.0234), ("resnet44", 0.0439)])
def test_real_images(shared_data: pathlib.Path, arch: str, expected: float) -> None:
  found = measure(real_network(shared_data, arch), cifar(shared_data, "test"))
  assert float(found.jkl) == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "expected"), [("resnet20", 0.379), ("resnet44", 0.497)])
def test_uniform_noise(shared_data: pathlib.Path, arch: str, expected: float) -> None:
  noise = np.random.default_rng(0).uniform(size=(256, 32, 32, 3)).astype(np.float32)
  assert float(measure(real_network(shared_data, arch), noise).jkl) == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_the_augmentation_of_training_explains_the_divergence_of_training_images(shared_data: pathlib.Path) -> None:
  network, x = real_network(shared_data, "resnet20"), cifar(shared_data, "train")[:1024]
  view = jax.jit(lambda key, x: augment(x, key, Augmentation(pad_crop=4, flip=True), duplicates=1))
  batches = (view(jax.random.key(i), jnp.asarray(x[i : i + 512])) for i in range(0, len(x), 512))
  assert float(measure(network, batches).jkl) < 0.0005


@pytest.mark.slow
def test_fashion_mnist_is_foreign(shared_data: pathlib.Path) -> None:
  path = pathlib.Path("/usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz")
  if not path.exists():
    pytest.skip("needs Debian's package dataset-fashion-mnist")
  import gzip

  pixels = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)[:512]
  padded = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))[..., None].repeat(3, axis=-1).astype(np.float32) / 255
  assert float(measure(real_network(shared_data, "resnet44"), padded).jkl) == pytest.approx(0.118, rel=0.02)
