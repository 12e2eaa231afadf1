"""Errors that a user can cause and repair. Each message is one sentence: what was expected and what was found."""

from __future__ import annotations


class KwjaxError(ValueError):
  """Base class of all errors; the command line prints its message and exits with status 2."""


class NoBatchNormError(KwjaxError):
  """A network without BatchNorm was given to a method that reads BatchNorm statistics."""


class WeightsError(KwjaxError):
  """A weight file is unreadable, refused, incomplete or does not fit the architecture."""


class CheckpointError(KwjaxError):
  """A checkpoint or stored image set is damaged, incomplete or belongs to another run."""


class DataError(KwjaxError):
  """A data set is missing, unreadable or has the wrong shape."""


class NonFiniteError(KwjaxError):
  """A loss became NaN or infinite; the message names the step, the layer and the last good checkpoint."""


class RuleError(KwjaxError):
  """A quantization rule is malformed, matches no layer or cannot be carried out."""


class Interrupted(Exception):
  """A run was asked to stop and has saved its state. The same call resumes it.

  Attributes:
    exit_status: exit status of the command, 128 plus the number of the signal.
  """

  exit_status: int = 130
