"""Packages that an extra of kwjax installs, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from kwjax.errors import KwjaxError


def require(module: str, *, extra: str, purpose: str) -> Any:
  """Imports a module that belongs to an extra.

  Args:
    module: full name of the module, "matplotlib.pyplot".
    extra: the extra of kwjax that installs it.
    purpose: what needs it, the start of the message: "writing the report".

  Returns: the module.

  Raises:
    KwjaxError: the package is not installed; the message names it and the extra.
  """
  try:
    return importlib.import_module(module)
  except ImportError as error:
    missing = module.partition(".")[0]
    raise KwjaxError(f'{purpose} needs the package {missing}: pip install "kwjax[{extra}]" ({error})') from error
