"""Every public name says what it does, what it takes and in which shapes; read from the signatures, not from a list."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

import kwjax

# What an array is called in an annotation, and how its shape is written: f32[b,h,w,c], i32[n], u8[n,h,w,c], [n,h,w,c], f32[].
_ARRAY = re.compile(r"\b(Array|ndarray)\b")
_SHAPE = re.compile(r"\b(?:[fiu]\d+|bool|[fi])\[[^\]]*\]|\[(?!\d)[a-z0-9 ,+*]+\]|\blike [a-z_`]+|PRNG key")


def functions() -> list[tuple[str, Any]]:
  """Public functions, and the public methods of public classes, by name."""
  found: list[tuple[str, Any]] = []
  for name in kwjax.__all__:
    value = getattr(kwjax, name)
    if inspect.isclass(value):
      for attribute, method in vars(value).items():
        plain = method.__func__ if isinstance(method, (classmethod, staticmethod)) else method
        if (
          not attribute.startswith("_")
          and inspect.isfunction(plain)
          and attribute not in ("tree_flatten", "tree_unflatten")
        ):
          found.append((f"{name}.{attribute}", plain))
    else:
      found.append((name, inspect.unwrap(value)))
  return found


def documented(text: str, section: str) -> dict[str, str]:
  """`{name: what is said of it}` in the section `Args:` or `Attributes:` of a docstring."""
  match = re.search(rf"^ *{section}:\n((?:(?:  +.*)?\n)*)", text + "\n", re.MULTILINE)
  if not match:
    return {}
  body = inspect.cleandoc("\n" + match[1])
  parts = re.split(r"^(\w+(?:, \w+)*):", body, flags=re.MULTILINE)[1:]
  return {name: words for names, words in zip(parts[::2], parts[1::2]) for name in names.split(", ")}


def array_arguments(function: Any) -> list[str]:
  """Arguments whose annotation names an array type."""
  parameters = inspect.signature(function).parameters.values()
  return [p.name for p in parameters if p.name not in ("self", "cls") and _ARRAY.search(str(p.annotation))]


@pytest.mark.parametrize("name", kwjax.__all__)
def test_every_name_is_there_with_a_summary_of_one_line(name: str) -> None:
  value = getattr(kwjax, name)
  text = inspect.getdoc(value) or ""
  own = value.__doc__ or ""
  first, _, rest = text.partition("\n")
  assert first, f"kwjax.{name} has no docstring"
  assert not own.startswith(f"{name}("), f"kwjax.{name} has the docstring that a dataclass or NamedTuple gives itself"
  assert first.rstrip().endswith((".", ":")), f"the summary of kwjax.{name} is no sentence in one line: {first!r}"
  assert not rest or rest.startswith("\n"), f"kwjax.{name}: an empty line is missing after the summary"


@pytest.mark.parametrize(("name", "function"), functions(), ids=[name for name, _ in functions()])
def test_arguments_are_documented_and_arrays_have_shapes(name: str, function: Any) -> None:
  text = inspect.getdoc(function) or ""
  assert text, f"kwjax.{name} has no docstring"
  arrays, said = array_arguments(function), documented(text, "Args")
  if not arrays:
    return
  parameters = [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
  if not said:  # one line may say it all
    assert _SHAPE.search(text), f"kwjax.{name} takes arrays ({', '.join(arrays)}) and names no shape"
    assert len(parameters) <= 2, f"kwjax.{name} has {len(parameters)} arguments and no section Args"
    return
  missing = [parameter for parameter in parameters if parameter not in said]
  assert not missing, f"kwjax.{name} does not document {', '.join(missing)}"
  strange = [parameter for parameter in said if parameter not in parameters]
  assert not strange, f"kwjax.{name} documents {', '.join(strange)}, which it does not take"
  shapeless = [array for array in arrays if not _SHAPE.search(said[array])]
  assert not shapeless, f"kwjax.{name}: no shape is given for {', '.join(shapeless)}"


@pytest.mark.parametrize(
  "name", [name for name in kwjax.__all__ if hasattr(getattr(kwjax, name), "__dataclass_fields__")]
)
def test_every_field_of_a_dataclass_is_documented(name: str) -> None:
  value = getattr(kwjax, name)
  said = documented(inspect.getdoc(value) or "", "Attributes")
  fields = [field for field in value.__dataclass_fields__ if not field.startswith("_")]
  missing = [field for field in fields if field not in said]
  assert not missing, f"kwjax.{name} does not document {', '.join(missing)}"


def test_the_reader_of_docstrings_sees_what_is_missing() -> None:
  text = inspect.cleandoc("""Does.

    Args:
      images, labels: f32[n,h,w,c]
        and i32[n].
      key: PRNG key.

    Returns:
      other: f32[].
    """)
  said = documented(text, "Args")
  assert sorted(said) == ["images", "key", "labels"]
  assert _SHAPE.search(said["images"])
  assert not _SHAPE.search("the images to forward, in [0, 1]")
  assert documented("Does.", "Args") == {}

  def function(images: kwjax.Moments, x: "jax.Array | None", *, n: int) -> None:  # type: ignore[name-defined] # noqa: F821, UP037
    """Does."""

  assert array_arguments(function) == ["x"]
