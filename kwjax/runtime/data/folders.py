"""Which images a folder holds, and which of its folders are classes."""

from __future__ import annotations

import os
import pathlib
import re

from kwjax.errors import DataError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
IGNORED = (".", "__MACOSX")
"""Prefixes of files and folders without images of the set."""


def names_below(folder: pathlib.Path) -> tuple[list[str], set[str]]:
  """Image files in a folder and its subfolders, linked ones too, and these folders, by relative path; no file is opened.

  Raises:
    DataError: a folder cannot be read. Skipping it would shift the labels of all classes after it.
  """

  def refuse(error: OSError) -> None:
    raise DataError(f"cannot read {error.filename}: {error.strerror or error}") from error

  found: list[pathlib.Path] = []
  folders: list[pathlib.Path] = []
  for place, inner, names in os.walk(folder, onerror=refuse, followlinks=True):
    here = pathlib.Path(os.path.abspath(place))
    above = {os.path.realpath(parent) for parent in (here, *here.parents)}
    # A link to a folder above it would never end.
    inner[:] = [n for n in inner if not n.startswith(IGNORED) and os.path.realpath(os.path.join(place, n)) not in above]
    found += [pathlib.Path(place, name) for name in names]
    folders += [pathlib.Path(place, name) for name in inner]
  relative = lambda paths: sorted(path.relative_to(folder).as_posix() for path in paths)
  return relative(p for p in found if p.suffix.lower() in SUFFIXES), set(relative(folders))


def class_folders(names: list[str], folders: set[str], num_classes: int | None, place: str) -> list[str]:
  """The folders on the first level that has several. An image below one of them is of its class, however deep it lies.

  Raises:
    DataError: one holds folders of images and no image of its own, so that the classes may lie deeper; or one holds no image,
      and whether it is a class is not known.
  """
  parents = {n.rpartition("/")[0] for n in names}
  every = {"/".join(parent.split("/")[:i]) for parent in parents | folders for i in range(1, parent.count("/") + 2)}
  level = sorted(folder for folder in every if "/" not in folder)
  while len(level) == 1 and level[0] not in parents:
    level = sorted(folder for folder in every if folder.rpartition("/")[0] == level[0])
  full = {folder: [p for p in parents if p == folder or p.startswith(folder + "/")] for folder in level}
  empty = [folder for folder in level if not full[folder]]
  if empty and len(level) != num_classes:
    raise DataError(
      f"{place}: folder {empty[0]} holds no images. Whether it is a class decides the labels behind it: remove it, or say how "
      f"many classes there are ({len(level)} folders, {num_classes or 'an unknown number of'} classes)"
    )
  deeper = next((folder for folder in level if full[folder] and folder not in parents), None)
  if deeper is not None:
    raise DataError(
      f"{place}: folder {deeper} holds no images of its own, only folders with images, such as {sorted(full[deeper])[0]}: name "
      "the folder whose folders are the classes"
    )
  return level


def class_indices(folders: list[str], num_classes: int | None, place: str) -> dict[str, int]:
  """The index of each class by the name of its folder: by ImageNet's order where all are its names, else sorted.

  Raises:
    DataError: two have the same name.
  """
  if len(set(folders)) != len(folders):
    raise DataError(f"{place} holds two class folders of the same name, {max(folders, key=folders.count)}")
  if num_classes in (None, 1000) and len(folders) < 1000 and all(re.fullmatch(r"n\d{8}", f) for f in folders):
    from kwjax.runtime.data.tfds import tfds

    known = tfds.core.tfds_path("datasets/imagenet2012/labels.txt").read_text().split()
    if set(folders) <= set(known):
      return {folder: known.index(folder) for folder in folders}
  return {folder: i for i, folder in enumerate(sorted(folders))}
