"""What the command line of a study named, loaded and checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from experiments._harness.image_sets import Source, identity, real, synthesized
from experiments._harness.study_options import Missing, StudyOptions
from kwjax.cli.options import config_of, fine_tuning_of
from kwjax.compression.settings import Sizes, memory_need
from kwjax.compression.workspace import REAL
from kwjax.distillation import DistillConfig
from kwjax.errors import KwjaxError
from kwjax.network import Network
from kwjax.runtime.data import ImageData, load_data
from kwjax.runtime.devices import memory
from kwjax.runtime.devices.parallel import DeviceGroup
from kwjax.synthesis import SynthesisConfig


class Setup(NamedTuple):
  """What the command line named, loaded and checked."""

  options: StudyOptions
  network: Network
  group: DeviceGroup
  chosen: Sizes
  eval_data: ImageData | None
  real_data: ImageData | None

  def config(self, scheme: str) -> SynthesisConfig:
    """Settings of a synthesis: published ones under --preset paper, else the project's defaults at the preset's size."""
    return config_of(self.options.main_job(scheme), self.network, self.chosen)

  def distill_config(self, chosen: Sizes, scheme: str) -> DistillConfig:
    """Settings of a fine-tuning on images of a scheme: those of the preset."""
    return fine_tuning_of(self.options.main_job(), chosen).config(self.network, scheme)

  def labelled(self) -> ImageData:
    """The images of --eval-data.

    Raises:
      Missing: there are none, or they have no labels.
    """
    if self.eval_data is None or self.eval_data.labels is None:
      split = "validation" if self._data_set == "imagenet2012" else "test"  # ImageNet's test images have no labels
      raise Missing(
        f"no labelled images were given: --eval-data FILE.npz:test, or --eval-data tfds:{self._data_set}:{split} after "
        f"python -m experiments.prepare_data {self._data_set} --source FOLDER"
      )
    return self.eval_data

  def source(self, name: str, count: int) -> Source:
    """Images of a row: "real", or those of a scheme.

    Raises:
      Missing: real ones without --real-data.
      KwjaxError: the real ones are those of --eval-data, or the scheme has no published settings for this network.
    """
    if name != REAL:
      return synthesized(self.network, self.config(name), count)
    if self.real_data is None:
      raise Missing(
        f"the real images need --real-data FILE.npz:train, or --real-data tfds:{self._data_set}:train after "
        f"python -m experiments.prepare_data {self._data_set} --source FOLDER"
      )
    if self.eval_data is not None and identity(self.real_data) == identity(self.eval_data):
      raise KwjaxError(
        f"--real-data {self.real_data.name} holds the images of --eval-data: accuracy must be measured on other ones"
      )
    return real(self.network, self.real_data, count)

  @property
  def _data_set(self) -> str:
    """What the network was probably trained on, by the name that `experiments.prepare_data` has for it."""
    small = self.network.image_shape[0] <= 64
    return ("cifar100" if self.network.num_classes == 100 else "cifar10") if small else "imagenet2012"

  def need(self, configs: Sequence[SynthesisConfig], *, distills: bool) -> memory.Need:
    """Memory at the peak of syntheses and of a fine-tuning."""
    images, trained = self.chosen.images + self.chosen.held_out, 0
    if distills and self.chosen.distill_steps:
      trained = self.chosen.distill_batch_size
    found = [memory_need(self.network, c, images=images, trained=trained, devices=self.group.size) for c in configs]
    return memory.Need(max(need.device for need in found), max(need.host for need in found))


def load(options: StudyOptions, network: Network, group: DeviceGroup, chosen: Sizes) -> Setup:
  """The set-up of a study with its data sets opened.

  Raises:
    DataError: a data set is not there or does not fit the network.
  """

  def opened(spec: str | None) -> ImageData | None:
    if spec is None:
      return None
    return load_data(spec, image_shape=network.image_shape, num_classes=network.num_classes)

  return Setup(options, network, group, chosen, opened(options.eval_data), opened(options.real_data))
