"""Make a data set for `tfds:NAME` out of the files its publishers offer, offline and without TensorFlow.

    python -m experiments.prepare_data cifar10 --source ~/Downloads
    python -m experiments.prepare_data imagenet2012 --source /data/ILSVRC --splits validation
    python -m experiments.cifar_bns --network networks/resnet20 --eval-data tfds:cifar10

Nothing is downloaded: --source is a folder that holds the original files under their official names (listed below).
They are checked against the published checksums and numbers of images, and written in array_record form into
DATA_DIR/NAME/VERSION, in the order and with the features that tensorflow-datasets gives them, so that
`kwjax.load_data("tfds:NAME")` and `tfds.data_source(NAME, data_dir=DATA_DIR)` read them, and slices such as `train[:1000]`
are the same images everywhere. What was interrupted leaves nothing that looks finished; start it again. Pickled files are
read without running code of theirs.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import tensorflow_datasets as tfds
import tqdm
import tyro
from tensorflow_datasets.core import hashing

from experiments._harness.archives import RECIPES, Recipe
from experiments._harness.archives.recipe import Opened, Records, Source
from kwjax.cli.arguments import parse
from kwjax.cli.command import run_command
from kwjax.errors import DataError
from kwjax.runtime.data.tfds_writer import DataSetInfo, SplitExamples, is_data_set, temporary_folder, write_tfds
from kwjax.runtime.reporting.messages import log

_ALIASES = {"imagenet": "imagenet2012", "svhn": "svhn_cropped", "fashion-mnist": "fashion_mnist"}
# A checksum of more would take longer than a minute; then the size must do.
_CHECKSUM_BYTES = 8 << 30


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of the command."""

  name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
  """The data set, one of those above."""
  source: Annotated[pathlib.Path, tyro.conf.arg(metavar="FOLDER")]
  """Folder with the downloaded files."""
  data_dir: Annotated[
    pathlib.Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: where readers look)")
  ] = None
  """Folder of all prepared data sets. Readers look in $TFDS_DATA_DIR, or in ~/tensorflow_datasets."""
  splits: Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="SPLIT ...", help_behavior_hint="(default: those with a *)")
  ] = ()
  """Splits to make."""
  verify: bool = True
  """Insist on the published checksums and numbers of images. --no-verify takes repacked archives and subsets; damage is
  still noticed as far as a format shows it."""
  overwrite: bool = False
  """Replace the data set if it is there already, for example to add a split."""


def describe_sets() -> str:
  """The known sets with their files and splits, for --help."""
  lines = ["data sets, their files and splits:"]
  for recipe in RECIPES.values():
    splits = ", ".join(f"{s}{'*' if s in recipe.default else ''} {n:,}" for s, n in recipe.counts.items())
    lines += [f"  {recipe.name}: {recipe.files}", f"    from {recipe.homepage}; {splits}"]
  return "\n".join(lines)


def prepare(options: Options) -> pathlib.Path:
  """Write the data set; returns its folder.

  Raises:
    DataError: the name or a split is unknown, a file is missing, damaged or not the published one, or another data set
      is in the way.
    KwjaxError: the folder cannot be written, or another process writes there.
  """
  recipe = _recipe(options.name)
  splits = options.splits or recipe.default
  for split in splits:
    if split not in recipe.counts:
      raise DataError(f"{recipe.name} has no split {split}, only {', '.join(recipe.counts)}")
  source = options.source.expanduser()
  if not source.is_dir():
    raise DataError(f"--source {source} is no folder; it must hold {recipe.files}, from {recipe.homepage}")
  data_dir = (options.data_dir or pathlib.Path(tfds.core.constants.DATA_DIR)).expanduser().absolute()
  # Its description is asked for as if nothing were there, or it would be that of the set that is.
  builder = tfds.builder(recipe.name, data_dir=os.fspath(data_dir / ".none"))
  folder = data_dir / recipe.name / str(builder.version)
  if is_data_set(folder) and not options.overwrite:
    return _already_there(folder, splits if options.splits else ())
  with temporary_folder(folder.with_name(f".{folder.name}.unpacked")) as scratch:
    opened = recipe.open(Source(source, _checksums(recipe, builder), options.verify, scratch), splits)
    _check_counts(recipe, opened, source, splits if options.splits else (), options.verify)
    _write(folder, builder, opened, options.overwrite)
  return folder


def _recipe(name: str) -> Recipe:
  recipe = RECIPES.get(_ALIASES.get(name, name))
  if recipe is None:
    raise DataError(f"no data set {name!r}, expected one of {', '.join(RECIPES)}")
  return recipe


def _already_there(folder: pathlib.Path, wanted: Sequence[str]) -> pathlib.Path:
  info = tfds.builder_from_directory(folder).info
  absent = sorted(set(wanted) - set(info.splits))
  if absent:
    raise DataError(
      f"{folder} is there without {', '.join(absent)}: --overwrite makes it anew with the splits you name"
    )
  if info.file_format.value not in ("array_record", "parquet"):
    raise DataError(
      f"{folder} is there in {info.file_format.value} form, which needs TensorFlow: --overwrite replaces it"
    )
  log("it is there already; --overwrite makes it anew")
  return folder


def _checksums(recipe: Recipe, builder: Any) -> dict[str, str]:
  """Published checksums by file name: those that tensorflow-datasets carries, and those of the recipe."""
  found = {}
  for url, info in (type(builder).url_infos or {}).items():
    size = int(info.size)
    found[url.rpartition("/")[2]] = f"bytes:{size}" if size > _CHECKSUM_BYTES else f"sha256:{info.checksum}"
  return {**found, **recipe.checksums}


def _check_counts(recipe: Recipe, opened: Opened, source: pathlib.Path, required: Sequence[str], verify: bool) -> None:
  missing = [split for split in required if split not in opened.splits]
  if missing or not opened.splits:
    raise DataError(f"{source} has no files of {' or '.join(missing or recipe.default)}: expected {recipe.files}")
  for split, records in opened.splits.items():
    if verify and len(records.keys) != recipe.counts[split]:
      raise DataError(
        f"{source}: {recipe.name} has {recipe.counts[split]:,} images in {split}, found {len(records.keys):,};"
        " --no-verify takes a part of the set"
      )


def _write(folder: pathlib.Path, builder: Any, opened: Opened, overwrite: bool) -> None:
  info = builder.info
  for feature, names in opened.class_names.items():
    try:
      info.features[feature].names = names
    except ValueError as error:
      raise DataError(f"{info.name}: unusable class names: {error}") from error
  described = DataSetInfo(
    name=info.name,
    features=info.features,
    version=str(builder.version),
    description=info.description,
    homepage=info.homepage,
    citation=info.citation,
    module_name=type(builder).__module__,
  )
  total = sum(len(records.keys) for records in opened.splits.values())
  with tqdm.tqdm(total=total, unit="image", desc=info.name) as bar:

    def count(split: str) -> None:
      bar.update()
      bar.set_postfix_str(split, refresh=False)

    splits = {s: SplitExamples(len(r.keys), _in_order(s, r)) for s, r in opened.splits.items()}
    write_tfds(folder, described, splits, overwrite=overwrite, on_example=count)


def _in_order(split: str, records: Records) -> Iterator[dict[str, Any]]:
  """In the order of tensorflow-datasets: by the hash of their keys, salted with the split."""
  hasher = hashing.Hasher(split)
  hashes = [hasher.hash_key(key) for key in records.keys]
  for index in sorted(range(len(hashes)), key=hashes.__getitem__):
    yield records.example(index)


def main(args: Sequence[str] | None = None) -> int:
  """Command line; returns the exit status."""
  description = f"{__doc__}\n{describe_sets()}"
  options = parse(Options, args, "prepare_data", description)

  def work() -> int:
    try:
      folder = prepare(options)
    except KeyboardInterrupt:
      log("interrupted, nothing was left; start it again")
      return 130
    log(f"{folder}: use it as tfds:{folder.parent.name}" + _where(options, folder))
    return 0

  return run_command(work)


def _where(options: Options, folder: pathlib.Path) -> str:
  if options.data_dir is None:
    return ""
  return f" with TFDS_DATA_DIR={folder.parent.parent}, or as tfds:{folder}"


if __name__ == "__main__":
  sys.exit(main())
