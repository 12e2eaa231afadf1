"""Downloads into a cache, by the library pooch: a file is there whole and with the right hash, or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import re
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

from kwjax.errors import WeightsError
from kwjax.optional import require
from kwjax.runtime.files import sha256_file

TIMEOUT_SECONDS = 30
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.(?:pth|pt|th|pth\.tar|safetensors)$")


def cache_folder() -> pathlib.Path:
  """`$KWJAX_CACHE`, by default `~/.cache/kwjax`."""
  return pathlib.Path(os.environ.get("KWJAX_CACHE") or "~/.cache/kwjax").expanduser()


def public_url(url: str) -> str:
  """The URL without user name, password, query and fragment, safe to print and store."""
  parts = urllib.parse.urlsplit(url)
  return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def hash_in_name(url: str) -> str | None:
  """The SHA-256 prefix that PyTorch's file names carry (`resnet18-f37072fd.pth`); None if there is none.

  Eight decimal digits count as a date, not a hash.
  """
  match = _HASH_IN_NAME.search(urllib.parse.urlsplit(url).path)
  return match[1] if match and not (match[1].isdigit() and len(match[1]) == 8) else None


def fetch(
  url: str, *, sha256_prefix: str | None = None, cache: pathlib.Path | None = None, progress: bool = True
) -> pathlib.Path:
  """Local path of the file at `url`, downloaded into the cache if it is missing.

  Args:
    url: `http://`, `https://` or `file://`; a `file://` URL is read in place.
    sha256_prefix: first hexadecimal digits of the expected SHA-256; default: those in the file's name, if any.
    cache: folder; by default `cache_folder()`.
    progress: show a progress bar on stderr.

  Raises:
    WeightsError: no network, an HTTP error, an incomplete body, or a hash that does not fit. The message has the URL.
    KwjaxError: pooch is not installed.
  """
  try:
    parts = urllib.parse.urlsplit(url)
    _ = parts.port
  except ValueError as error:
    raise WeightsError(f"{url!r} is not a URL: {error}") from error
  if parts.scheme == "file":
    return _local(url, parts)
  if parts.scheme not in ("http", "https") or not parts.netloc:
    raise WeightsError(f"{public_url(url)!r} is not a URL this program reads, expected http://, https:// or file://")
  expected = (sha256_prefix or hash_in_name(url) or "").lower() or None
  last = pathlib.PurePosixPath(urllib.parse.unquote(parts.path)).name
  name = re.sub(r"[^A-Za-z0-9._-]", "_", last)[-100:] or "weights"
  folder = (cache or cache_folder()) / "downloads" / hashlib.sha256(url.encode()).hexdigest()[:16]
  pooch = require("pooch", extra="download", purpose="a download")
  requests = require("requests", extra="download", purpose="a download")
  try:
    if expected and (folder / name).is_file() and not sha256_file(folder / name).startswith(expected):
      (folder / name).unlink()
    with _quiet(pooch):
      found = pooch.retrieve(url, None, name, folder, downloader=_Downloader(pooch, expected, progress))
  except requests.RequestException as error:
    raise WeightsError(_network_message(url, error)) from error
  except UnicodeError as error:
    raise WeightsError(f"{public_url(url)!r} names a machine that cannot be found") from error
  except OSError as error:
    raise WeightsError(f"cannot keep {public_url(url)} in {folder}: {error.strerror or error}") from error
  return pathlib.Path(found)


@contextlib.contextmanager
def _quiet(pooch: Any) -> Iterator[None]:
  """Without pooch's own lines, which show the whole URL."""
  logger = pooch.get_logger()
  before = logger.level
  logger.setLevel("WARNING")
  try:
    yield
  finally:
    logger.setLevel(before)


class _Downloader:
  """Pooch's download over HTTP, and the check of a hash of which only the first digits are known.

  Pooch compares whole hashes only. It calls this with a temporary file, which becomes the cached one unless this raises.
  """

  def __init__(self, pooch: Any, expected: str | None, progress: bool) -> None:
    headers = {"User-Agent": "kwjax", "Accept-Encoding": "identity"}
    self._download = pooch.HTTPDownloader(progressbar=progress, headers=headers, timeout=TIMEOUT_SECONDS)
    self._expected = expected

  def __call__(self, url: str, output_file: str, pooch: Any, check_only: bool = False) -> None:
    self._download(url, output_file, pooch, check_only=check_only)
    found = sha256_file(pathlib.Path(output_file))
    if self._expected and not found.startswith(self._expected):
      raise WeightsError(
        f"the download of {public_url(url)} is damaged or not the expected file: its sha256 should begin "
        f"with {self._expected}, found {found[: max(16, len(self._expected))]}; it was removed"
      )


def _local(url: str, parts: urllib.parse.SplitResult) -> pathlib.Path:
  if parts.netloc not in ("", "localhost"):
    raise WeightsError(
      f"{public_url(url)} names the machine {parts.netloc!r}: a file URL has three slashes, file:///path"
    )
  path = pathlib.Path(urllib.request.url2pathname(parts.path))
  if not path.exists():
    raise WeightsError(f"{path}: no such file")
  return path


def _network_message(url: str, error: Any) -> str:
  shown = public_url(url)
  if error.response is not None:
    return f"the server answered {error.response.status_code} {error.response.reason} for {shown}"
  kind = type(error).__name__
  if kind == "ChunkedEncodingError":
    return f"the download of {shown} was cut off; run it again"
  # The text of the error may repeat the URL with what is secret in it.
  return (
    f"cannot download {shown}: {_reason(error) or kind}; without a network, fetch the file on another machine and give its "
    "path as the source"
  )


def _reason(error: BaseException | None) -> str | None:
  """What the operating system said, at the bottom of the chain of errors."""
  while error is not None:
    if isinstance(error, OSError) and error.strerror:
      return error.strerror
    inner = getattr(error, "reason", None) or (error.args[0] if error.args else None)
    error = error.__cause__ or error.__context__ or (inner if isinstance(inner, BaseException) else None)
  return None
