"""Where the names of the classes come from, and what is wrong with a file that has none."""

from __future__ import annotations

import pathlib

import pytest

from kwjax.cli.options import Options
from kwjax.cli.run_settings import class_names
from kwjax.errors import KwjaxError
from tests.networks import tiny_network

NAMES = ["cat", "dog", "crane", "crane", "snow leopard"]


def test_names_come_from_the_option_or_the_folder_of_the_network(tmp_path: pathlib.Path) -> None:
  network = tiny_network()
  assert class_names(Options(), network) is None
  assert class_names(Options(network=tmp_path), network) is None
  (tmp_path / "class_names.txt").write_text("\n".join(NAMES) + "\n")
  assert class_names(Options(network=tmp_path), network) == NAMES
  (tmp_path / "others.txt").write_bytes("Käfer\r\nb\r\n c \r\nd\r\ne".encode())
  assert class_names(Options(network=tmp_path, class_names=tmp_path / "others.txt"), network) == [
    "Käfer",
    "b",
    "c",
    "d",
    "e",
  ]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (None, r"names\.txt cannot be read: No such file"),
    (b"a\nb\nc\nd\n", r"names\.txt has 4 lines, but tiny has 5 classes: one name a line"),
    (b"a\nb\n\nd\ne\n", r"line 3 of .*names\.txt is empty"),
    (b"a\nb\n\xff\nd\ne\n", r"names\.txt is not UTF-8 text"),
  ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: pathlib.Path, content: bytes | None, message: str) -> None:
  if content is not None:
    (tmp_path / "names.txt").write_bytes(content)
  with pytest.raises(KwjaxError, match=message):
    class_names(Options(class_names=tmp_path / "names.txt"), tiny_network())
