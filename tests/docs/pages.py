"""What the documentation's tests read out of its pages."""

from __future__ import annotations

import pathlib
import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
_GENERATED = "results"
_BETWEEN = ("&&", "||", "|", ";")


def pages() -> list[pathlib.Path]:
  """README.md and the pages of docs/ that people write."""
  return [ROOT / "README.md", *(p for p in sorted(DOCS.rglob("*.md")) if p.relative_to(DOCS).parts[0] != _GENERATED)]


def name(page: pathlib.Path) -> str:
  """A page as the ids of tests have it."""
  return page.relative_to(ROOT).as_posix()


class Block(NamedTuple):
  """Code of a page.

  Attributes:
    language: "python", "bash", ..., or "test" for hidden set-up, Python in a comment `<!-- test`, ended by a line `-->`,
      which readers do not see and the tests run at its place.
    line: number of the code's first line in the page, from 1.
    code: without its indentation.
  """

  language: str
  line: int
  code: str


def blocks(text: str) -> list[Block]:
  """Fenced blocks and hidden set-up of a page, in order."""
  found: list[Block] = []
  lines = text.splitlines()
  number = 0
  while number < len(lines):
    opened = re.fullmatch(r"(\s*)(```+)(\w*).*|<!-- test", lines[number])
    number += 1
    if opened is None:
      continue
    fence, first = opened.group(2), number
    while number < len(lines) and lines[number].strip() != (fence or "-->"):
      number += 1
    indent = len(opened.group(1) or "")
    code = "\n".join(line[indent:] for line in lines[first:number])
    found.append(Block(opened.group(3) if fence else "test", first + 1, code))
    number += 1
  return found


class Command(NamedTuple):
  """`python -m module args` of a shell line, or `kwjax args`, whose module is `kwjax`."""

  module: str
  args: tuple[str, ...]


def commands(code: str) -> Iterator[Command]:
  """Every `python -m` and every `kwjax` of a shell block, also inside quotes of another command (gcloud --command "...")."""
  for line in code.replace("\\\n", " ").splitlines():
    tokens = shlex.split(line, comments=True)
    for i, token in enumerate(tokens):
      if " -m " in token:
        yield from commands(token)
      elif token == "-m" and re.search(r"python3?$", tokens[i - 1]):
        yield Command(tokens[i + 1], _arguments(tokens[i + 2 :]))
      elif token == "kwjax" and (i == 0 or tokens[i - 1] in _BETWEEN):
        yield Command(token, _arguments(tokens[i + 1 :]))


def _arguments(tokens: list[str]) -> tuple[str, ...]:
  end = next((i for i, token in enumerate(tokens) if token in _BETWEEN), len(tokens))
  return tuple(tokens[:end])
