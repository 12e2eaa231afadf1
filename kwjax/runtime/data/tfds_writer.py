"""Writes data sets in the form of tensorflow-datasets (array_record files and their description) without TensorFlow."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from kwjax.errors import DataError, KwjaxError
from kwjax.runtime.data.tfds import dataset_info, example_serializer, naming, tfds
from kwjax.runtime.files import PathLike
from kwjax.runtime.workdir import LOCK_FILES, lock_workdir

DESCRIPTION_FILE = "dataset_info.json"
"""The file that makes a folder a data set; it is written last."""
SHARD_BYTES = 256 << 20
_FORMAT = "array_record"


@dataclasses.dataclass(frozen=True)
class SplitExamples:
  """One split: how many examples there are, and the examples, as the features of the data set take them."""

  count: int
  examples: Iterable[Mapping[str, Any]]


class DataSetInfo(NamedTuple):
  """What a data set says of itself.

  Attributes:
    name: lower case letters, digits and underscores.
    features: `tfds.features.FeaturesDict`; images go in as encoded bytes, since encoding arrays needs TensorFlow.
    version: three numbers, such as 1.0.0.
    description: for people.
    homepage: of the original.
    citation: BibTeX of the original.
    module_name: the module that defines the data set.
    metadata: JSON-able facts, kept in `metadata.json`.
  """

  name: str
  features: Any
  version: str = "1.0.0"
  description: str = ""
  homepage: str = ""
  citation: str = ""
  module_name: str = __name__
  metadata: Mapping[str, Any] | None = None


def write_tfds(
  folder: PathLike,
  info: DataSetInfo,
  splits: Mapping[str, SplitExamples],
  *,
  overwrite: bool = False,
  on_example: Callable[[str], None] = lambda split: None,
  shard_bytes: int = SHARD_BYTES,
) -> pathlib.Path:
  """Writes a data set that `tfds.builder_from_directory(folder)` and `load_data("tfds:FOLDER")` read.

  For `tfds.data_source(NAME, data_dir=D)` the folder must be `D/NAME/VERSION`. Everything is written into a hidden folder
  beside it, read back, and renamed at the end: killed at any moment, nothing is there that looks finished, and the same
  call starts over.

  Args:
    folder: the folder to make.
    info: features and description.
    splits: the examples by split, written in the order they come; read once.
    overwrite: replace a data set that is there.
    on_example: called with the split after each example, for a progress bar.
    shard_bytes: a file is closed at this size; readers need not hold one in memory.

  Returns:
    `folder`.

  Raises:
    DataError: a name cannot be used; something is there already (and is not to be overwritten, or is no data set); or a
      split does not yield `count` examples, at least one.
    KwjaxError: another process writes the same data set, or the folder cannot be written.
  """
  folder = pathlib.Path(folder).expanduser().absolute()
  _check_names(info.name, splits)
  _check_target(folder, overwrite)
  described = _described(info, folder)
  try:
    with temporary_folder(folder.with_name(f".{folder.name}.incomplete")) as incomplete:
      serializer = example_serializer.ExampleSerializer(info.features.get_serialized_info())
      infos = []
      for name, split in splits.items():
        records = _serialized(split.examples, info.features, serializer, functools.partial(on_example, name))
        lengths, size = _write_shards(incomplete, name, records, shard_bytes)
        if sum(lengths) != split.count or not split.count:
          raise DataError(f"{info.name}, split {name}: expected {split.count} examples, found {sum(lengths)}")
        template = _template(incomplete, info.name, name)
        for index in range(len(lengths)):
          final = template.sharded_filepath(shard_index=index, num_shards=len(lengths))
          os.rename(_shard_path(incomplete, name, index), final)
        infos.append(tfds.core.SplitInfo(name=name, shard_lengths=lengths, num_bytes=size, filename_template=template))
      described.set_splits(tfds.core.splits.SplitDict(infos))
      described.write_to_directory(incomplete)
      _check_readable(incomplete, {name: split.count for name, split in splits.items()})
      _publish(incomplete, folder)
  except OSError as error:
    raise KwjaxError(f"cannot write {folder}: {error.strerror or error}; nothing was left there") from error
  return folder


def is_data_set(folder: PathLike) -> bool:
  """Whether a folder holds a finished data set."""
  return (pathlib.Path(folder) / DESCRIPTION_FILE).is_file()


def _check_target(folder: pathlib.Path, overwrite: bool) -> None:
  if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
    return
  if not is_data_set(folder):
    raise DataError(f"{folder} is not empty and holds no data set: choose another folder")
  if not overwrite:
    raise DataError(f"{folder} already holds a data set: overwrite it expressly, or choose another folder")


def _check_names(name: str, splits: Iterable[str]) -> None:
  """Names go into file names, and into what readers parse: NAME/CONFIG:VERSION, SPLIT[:10%]+OTHER."""
  if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
    raise DataError(f"a data set's name must be of lower case letters, digits and underscores, found {name!r}")
  for split in splits:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", split) or split == "all":
      raise DataError(f"a split's name must be of letters, digits and underscores and not 'all', found {split!r}")


def _described(info: DataSetInfo, folder: pathlib.Path) -> Any:
  try:
    identity = dataset_info.DatasetIdentity(
      name=info.name,
      version=tfds.core.Version(info.version),
      data_dir=os.fspath(folder),
      module_name=info.module_name,
    )
    metadata = None if info.metadata is None else tfds.core.MetadataDict(info.metadata)
    described = tfds.core.DatasetInfo(
      builder=identity,
      features=info.features,
      description=info.description,
      homepage=info.homepage,
      citation=info.citation,
      supervised_keys=("image", "label") if {"image", "label"} <= set(info.features) else None,
      metadata=metadata,
    )
    described.set_file_format(_FORMAT)
  except ValueError as error:
    raise DataError(f"data set {info.name} {info.version}: {str(error).splitlines()[0]}") from error
  return described


@contextlib.contextmanager
def temporary_folder(folder: PathLike) -> Iterator[pathlib.Path]:
  """An empty folder of this name, held by this process alone; it is gone afterwards, unless it was renamed.

  What a killed run left there is removed first.

  Raises:
    KwjaxError: another process holds it.
  """
  with lock_workdir(folder) as held:
    number = held.stat().st_ino
    for path in held.iterdir():
      if path.is_dir():
        shutil.rmtree(path)
      elif path.name not in LOCK_FILES:
        path.unlink()
    try:
      yield held
    finally:
      # Renamed, it may have given place to the folder of another process.
      if held.exists() and held.stat().st_ino == number:
        shutil.rmtree(held, ignore_errors=True)


def _serialized(
  examples: Iterable[Mapping[str, Any]], features: Any, serializer: Any, done: Callable[[], None]
) -> Iterator[bytes]:
  for example in examples:
    yield serializer.serialize_example(features.encode_example(example))
    done()


def _shard_path(folder: pathlib.Path, split: str, index: int) -> pathlib.Path:
  # The final name holds the number of files, which is known only at the end.
  return folder / f"{split}-{index:05d}.part"


def _template(folder: pathlib.Path, name: str, split: str) -> Any:
  return naming.ShardedFileTemplate(data_dir=folder, dataset_name=name, split=split, filetype_suffix=_FORMAT)


def _write_shards(
  folder: pathlib.Path, split: str, records: Iterator[bytes], shard_bytes: int
) -> tuple[list[int], int]:
  """Writes records into as many files as needed; returns the number of records of each, and the bytes of all."""
  from array_record.python import array_record_module

  lengths: list[int] = []
  total = 0
  record = next(records, None)
  while record is not None:
    path = _shard_path(folder, split, len(lengths))
    # Readers fetch single records in any order: groups of one need not decompress their neighbours.
    writer = array_record_module.ArrayRecordWriter(os.fspath(path), "group_size:1")
    count = size = 0
    while record is not None and (not count or size + len(record) <= shard_bytes):
      _told(writer.write, record)
      count, size = count + 1, size + len(record)
      record = next(records, None)
    _told(writer.close)
    lengths.append(count)
    total += size
  return lengths, total


def _told(act: Callable[..., None], *args: bytes) -> None:
  try:
    act(*args)
  except RuntimeError as error:
    # array_record reports a full disk so, with the path and the reason in its text.
    raise KwjaxError(f"cannot write the data set, nothing was left there: {error}") from error


def _check_readable(folder: pathlib.Path, counts: Mapping[str, int]) -> None:
  builder = tfds.builder_from_directory(folder)
  for split, count in counts.items():
    examples = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    if len(examples) != count:
      raise DataError(f"{folder.name}, split {split}: wrote {count} examples, read back {len(examples)}")
    for index in (0, count - 1):
      _ = examples[index]


def _publish(incomplete: pathlib.Path, folder: pathlib.Path) -> None:
  for name in LOCK_FILES:
    (incomplete / name).unlink(missing_ok=True)
  for path in incomplete.iterdir():
    # After a power cut a renamed folder must not hold empty files.
    with path.open("rb") as file:
      os.fsync(file.fileno())
  replaced = folder.with_name(f".{folder.name}.replaced")
  shutil.rmtree(replaced, ignore_errors=True)
  if folder.exists():
    os.rename(folder, replaced)
  os.rename(incomplete, folder)
  shutil.rmtree(replaced, ignore_errors=True)
