"""Downloads into a cache: atomic, resumable, checked by hash; `file://` URLs are read in place."""

from __future__ import annotations

import hashlib
import http.client
import os
import pathlib
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from tqdm import tqdm

from kwjax.errors import WeightsError
from kwjax.runtime.files import sha256_file

try:
  import fcntl
except ImportError:  # Windows: two downloads of one file at once are then not kept apart
  fcntl = None  # type: ignore[assignment]

CHUNK_BYTES = 1 << 18
TIMEOUT_SECONDS = 30
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.(?:pth|pt|th|pth\.tar|safetensors)$")


def cache_folder() -> pathlib.Path:
  """`$KWJAX_CACHE`, by default `~/.cache/kwjax`."""
  return pathlib.Path(os.environ.get("KWJAX_CACHE") or "~/.cache/kwjax").expanduser()


def public_url(url: str) -> str:
  """The URL without user name, password, query and fragment: what may be printed and stored."""
  parts = urllib.parse.urlsplit(url)
  return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def hash_in_name(url: str) -> str | None:
  """The SHA-256 prefix that PyTorch's file names carry (`resnet18-f37072fd.pth`); None if there is none.

  Eight decimal digits alone are taken for a date, not a hash.
  """
  match = _HASH_IN_NAME.search(urllib.parse.urlsplit(url).path)
  return match[1] if match and not (match[1].isdigit() and len(match[1]) == 8) else None


def fetch(
  url: str, *, sha256_prefix: str | None = None, cache: pathlib.Path | None = None, progress: bool = True
) -> pathlib.Path:
  """Local path of what `url` names, downloaded into the cache if it is not there.

  The body goes to a `.part` file, which becomes the cached file only when it is complete and its hash fits. A download
  that broke off continues where it stopped, if a hash prefix is known to check the result by.

  Args:
    url: `http://`, `https://` or `file://`.
    sha256_prefix: first hexadecimal digits of the expected SHA-256; by default those in the file's name, if any.
    cache: folder; by default `cache_folder()`.
    progress: show a progress bar on stderr.

  Raises:
    WeightsError: naming the URL: no network, an HTTP error, a body cut off, or a hash that does not fit.
  """
  try:
    parts = urllib.parse.urlsplit(url)
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
  target, part = folder / name, folder / f"{name}.part"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if target.is_file() and (expected is None or sha256_file(target).startswith(expected)):
      return target
    with _locked(part, url) as file:
      if expected is None:
        file.truncate(0)
      _download(url, file, progress, name)
      _check_hash(file, part, expected, url)
      os.replace(part, target)
  except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
    raise WeightsError(_network_message(url, error)) from error
  except UnicodeError as error:
    raise WeightsError(f"{public_url(url)!r} names no machine that can be looked up") from error
  except OSError as error:
    raise WeightsError(f"cannot keep {public_url(url)} in {folder}: {error.strerror or error}") from error
  return target


def _local(url: str, parts: urllib.parse.SplitResult) -> pathlib.Path:
  if parts.netloc not in ("", "localhost"):
    raise WeightsError(
      f"{public_url(url)} names the machine {parts.netloc!r}: a file URL has three slashes, file:///path"
    )
  path = pathlib.Path(urllib.request.url2pathname(parts.path))
  if not path.exists():
    raise WeightsError(f"{path}: no such file")
  return path


@contextmanager
def _locked(part: pathlib.Path, url: str) -> Iterator[BinaryIO]:
  with open(part, "a+b") as file:
    if fcntl is not None:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        raise WeightsError(f"another process is downloading {public_url(url)}: wait for it and run again") from None
    yield file


def _download(url: str, file: BinaryIO, progress: bool, name: str) -> None:
  """Append to `file` what it lacks of the body."""
  have = file.seek(0, os.SEEK_END)
  headers = {"User-Agent": "kwjax", "Accept-Encoding": "identity"}
  if have:
    headers["Range"] = f"bytes={have}-"
  quoted = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
  try:
    response = urllib.request.urlopen(urllib.request.Request(quoted, headers=headers), timeout=TIMEOUT_SECONDS)
  except urllib.error.HTTPError as error:
    if error.code != 416 or not have:
      raise
    # Nothing is left to send: the part is complete (its hash decides) or belongs to an older, longer file.
    return
  with response:
    if have and not _continues(response, have):
      file.truncate(0)
      have = 0
    length = response.headers.get("Content-Length")
    total = have + int(length) if length and length.isdigit() else None
    with tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=name, disable=not progress) as bar:
      while chunk := response.read(CHUNK_BYTES):
        file.write(chunk)
        bar.update(len(chunk))
  file.flush()
  size = file.seek(0, os.SEEK_END)
  if total is not None and size != total:
    raise WeightsError(
      f"the download of {public_url(url)} was cut off: {size} of {total} bytes arrived; run it again to continue"
    )


def _continues(response: Any, have: int) -> bool:
  sent = response.headers.get("Content-Range", "")
  return bool(response.status == 206 and sent.startswith(f"bytes {have}-"))


def _check_hash(file: BinaryIO, part: pathlib.Path, expected: str | None, url: str) -> None:
  file.flush()
  found = sha256_file(part)
  if expected is not None and not found.startswith(expected):
    file.truncate(0)  # nothing of a wrong body may be continued
    raise WeightsError(
      f"the download of {public_url(url)} is damaged or not the expected file: its sha256 should begin "
      f"with {expected}, found {found[: max(16, len(expected))]}; it was removed"
    )


def _network_message(url: str, error: Exception) -> str:
  shown = public_url(url)
  if isinstance(error, urllib.error.HTTPError):
    return f"the server answered {error.code} {error.reason} for {shown}"
  if isinstance(error, http.client.IncompleteRead):
    return f"the download of {shown} was cut off; run it again to continue"
  reason = getattr(error, "reason", None) or error
  return (
    f"cannot download {shown}: {reason}; without a network, fetch the file on another machine and give its path "
    "as the source"
  )
