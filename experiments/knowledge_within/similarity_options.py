"""Options of the table of similarities, and the networks and sets of images that they name."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated

import tyro

from experiments._harness.image_sets import synthesized
from experiments._harness.study_options import StudyOptions
from experiments.knowledge_within.similarity_sets import (
  FGSM,
  GAUSSIAN,
  GROUP,
  RANDOM,
  TRAIN,
  ImageSet,
  Subject,
  noise_sets,
  real_set,
)
from kwjax.cli.options import config_of, sizes
from kwjax.errors import DataError, KwjaxError
from kwjax.network import Network, load_network
from kwjax.runtime.data import load_data

_COUNTS = {"cpu": 2000, "smoke": 2 * GROUP, "paper": None}
_RESERVED = (TRAIN, RANDOM, GAUSSIAN, FGSM)


@dataclasses.dataclass(frozen=True)
class Options(StudyOptions):
  """Options of Table 4."""

  networks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=FOLDER")] = ()
  """Networks, each with the name of the set of --data that it was trained for."""
  data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=SPEC")] = ()
  """Sets to show to every network; SPEC as in --eval-data."""
  train_data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=SPEC")] = ()
  """What the networks were trained on, by the names of --networks."""

  def count(self) -> int | None:
    """Images of a set at most; None for all."""
    return _COUNTS[self.preset] if self.images is None else self.images


def pairs(option: str, values: Sequence[str]) -> list[tuple[str, str]]:
  """(NAME, VALUE) of each `NAME=VALUE`.

  Raises:
    KwjaxError: one is not of that form.
  """
  found = [tuple(value.split("=", 1)) for value in values]
  bad = next((value for value, pair in zip(values, found) if len(pair) < 2 or not all(pair)), None)
  if bad is not None:
    raise KwjaxError(f"--{option} takes NAME=VALUE, found {bad!r}")
  return [(name, value) for name, value in found]


def subjects(options: Options) -> list[Subject]:
  """The networks of the command line with the sets they can be shown.

  Raises:
    KwjaxError: an option is not of its form, a name is unknown or given twice; or as `load_network` and `load_data`.
  """
  data, train = (dict(pairs(*named)) for named in (("data", options.data), ("train-data", options.train_data)))
  taken = [name for name in data if name in _RESERVED]
  if taken or len(data) < len(options.data):
    raise KwjaxError(f"--data needs different names other than {', '.join(_RESERVED)}, found {' '.join(options.data)}")
  owners, found = [own for own, _ in pairs("networks", options.networks)], list[Subject]()
  stray = [name for name in train if name not in owners]
  if stray:
    raise KwjaxError(f"--train-data {stray[0]}: no network of --networks is called that, found {', '.join(owners)}")
  for spec in (*data.values(), *train.values()):
    # A set that is not there is a mistake, one that does not fit a network a cell that stays empty.
    load_data(spec, limit=1)
  for own, folder in pairs("networks", options.networks):
    if own not in data:
      raise KwjaxError(
        f"--networks {own}={folder}: there is no {own!r} in --data, found {', '.join(data) or 'nothing'}"
      )
    subject = _subject(options, own, load_network(pathlib.Path(folder)), data, train.get(own))
    if subject.name in [other.name for other in found]:
      raise KwjaxError(f"--networks names two networks that are called {subject.name}")
    found.append(subject)
  return found


def _subject(options: Options, own: str, network: Network, data: Mapping[str, str], train: str | None) -> Subject:
  specs = dict(data) if train is None else {TRAIN: train, **data}
  sets: dict[str, ImageSet] = {}
  absent = {TRAIN: f"the training data of the {own} network need --train-data {own}=FILE.npz:train"}
  for name, spec in specs.items():
    classes = network.num_classes if name in (TRAIN, own) else None
    try:
      opened = load_data(spec, image_shape=network.image_shape, num_classes=classes)
    except DataError as error:
      if name in (TRAIN, own):
        raise
      absent[name] = f"the {own} network cannot be shown {name}: {error}"
      continue
    sets[name] = real_set(name, opened, options.count())
  if TRAIN in sets and sets[TRAIN].settings == sets[own].settings:
    raise KwjaxError(f"--train-data {own} holds the images of --data {own}: detectors must be judged on other ones")
  noise = noise_sets(network, sets[own].size)
  sets |= {made.name: made for made in noise}
  job = dataclasses.replace(options, images=None).main_job()
  chosen = sizes(job, network)
  made = synthesized(network, config_of(job, network, chosen), chosen.images)
  return Subject(f"{network.name}@{own}", network, own, sets, absent, made)
