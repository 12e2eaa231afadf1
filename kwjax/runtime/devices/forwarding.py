"""Forward a set of images once, batch by batch, over devices and processes.

Everything in kwjax that walks over a data set goes through two functions:

- `forward_rows` is for what each image has of its own, such as logits. All batches have one shape, and one compilation
  serves them. Several processes share the images.
- `forward_batches` is for what a batch has as a whole, such as its statistics. Batches are as equal as possible and are
  the same on any number of devices: padding gets the weight zero.

Both take a pure function, compile it once per group of devices, and read images only when a batch needs them. While the
host takes in one batch, the devices work on the next.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from tqdm.auto import tqdm

from kwjax.errors import DataError, Interrupted, NonFiniteError
from kwjax.network import Array
from kwjax.runtime.data.images import ImageData, pad_batch
from kwjax.runtime.devices import processes
from kwjax.runtime.devices.batch_sizes import even_edges, forward_size, in_parts
from kwjax.runtime.devices.parallel import DeviceGroup, Devices, device_group

Images = np.ndarray | jax.Array | ImageData
"""f32[n,h,w,c] in [0,1], or a data set that decodes its images when they are read."""

PyTree = Any
T = TypeVar("T")


class Forwarded(NamedTuple):
  """What a step found in one batch.

  Attributes:
    found: pytree of NumPy arrays [d, ...], one entry per device of this process.
    images: number of images in the batch, without padding.
  """

  found: PyTree
  images: int


def forward_rows(
  step: Callable[..., PyTree],
  constants: PyTree,
  images: Images,
  *labels: np.ndarray,
  batch_size: int,
  description: str,
  devices: Devices = None,
  progress: bool = False,
  should_stop: Callable[[], bool] = lambda: False,
  check: Callable[[PyTree], str | None] = lambda rows: None,
  options: Mapping[str, Hashable] | None = None,
) -> Iterator[PyTree]:
  """Yields the rows that a step gives for the images, batch by batch and in order.

  Of several processes each forwards its own share, the images `kwjax.runtime.devices.processes.share(n)`, and all must make this
  call. A process without images forwards one batch of padding and yields no row of it, so that each learns the shapes.

  Args:
    step: pure function `(constants, images f32[b,h,w,c], *labels, **options) -> pytree of arrays [b, ...]`. A row depends
      on its own image alone.
    constants: pytree that every device gets a copy of, such as a network.
    images: f32[n,h,w,c], or a data set.
    *labels: arrays [n, ...] that are cut like the images.
    batch_size: most images forwarded at a time over all devices, see `kwjax.runtime.devices.batch_sizes`.
    description: text of the progress bar.
    devices: see `kwjax.runtime.devices.parallel.device_group`; of several processes each uses its own.
    progress: show a progress bar.
    should_stop: called after each batch; True ends the pass.
    check: says what is wrong with the rows of a batch, or None.
    options: static keyword arguments of the step.

  Yields:
    Pytree of NumPy arrays [rows of one batch, ...], without padding.

  Raises:
    DataError: there are no images, or the batch size is below 1.
    NonFiniteError: `check` found something, in any process.
    Interrupted: `should_stop` returned True in any process. What was forwarded until then is yielded first.
  """
  check_batch_size(batch_size)
  if not len(images):
    raise DataError("expected at least one image, found none")
  group, own = device_group(devices).local, processes.share(len(images))
  size = forward_size(group, batch_size, len(own), image_shape(images))

  def batches() -> Iterator[tuple[tuple[Any, ...], int]]:
    for start in starts:
      stop = min(start + size, own.stop)
      pixels, others = read(images, start, stop), [np.asarray(label[start:stop]) for label in labels]
      yield tuple(_padded(rows, size) for rows in (pixels, *others)), len(pixels)

  starts = range(own.start, max(own.stop, own.start + 1), size)
  compiled = _compiled(_rows_of, step, group, tuple((options or {}).items()))
  walk = progress_bar(batches(), description, total=len(starts), progress=progress)
  host = lambda found, count: jax.tree.map(lambda rows: rows[:count], group.unshard(found))
  return _results(compiled, constants, walk, group, host, should_stop, check)


def forward_batches(
  step: Callable[..., PyTree],
  constants: PyTree,
  images: Images | Iterable[np.ndarray | jax.Array],
  *,
  batch_size: int,
  description: str,
  devices: Devices = None,
  progress: bool = False,
  should_stop: Callable[[], bool] = lambda: False,
  check: Callable[[PyTree], str | None] = lambda found: None,
  options: Mapping[str, Hashable] | None = None,
  share: bool = False,
) -> Iterator[Forwarded]:
  """Yields what a step finds in each batch as a whole.

  A set of known length is cut into batches whose sizes differ by one at most: two shapes to compile. The cut does not
  depend on the devices. A batch that does not divide over them is padded.

  Args:
    step: pure function `(constants, images f32[b,h,w,c], weights, *, axis_name, **options) -> pytree of arrays`, called on
      every device with its images. The weights f32[b] are 1 for an image and 0 for padding, or None where nothing is padded.
    constants: pytree that every device gets a copy of, such as a network.
    images: f32[n,h,w,c], a data set, or an iterable of batches f32[b,h,w,c], which are forwarded as they come.
    batch_size: most images in a batch over all devices.
    description: text of the progress bar.
    devices: see `kwjax.runtime.devices.parallel.device_group`; of several processes each uses its own.
    progress: show a progress bar.
    should_stop: called after each batch; True ends the pass.
    check: says what is wrong with what was found in a batch, or None.
    options: static keyword arguments of the step.
    share: of several processes each takes every so-manieth batch; default: every process takes all of them.

  Yields:
    `Forwarded`, in order.

  Raises:
    DataError: the batch size is below 1.
    NonFiniteError: `check` found something, in any process.
    Interrupted: `should_stop` returned True in any process. What was forwarded until then is yielded first.
  """
  check_batch_size(batch_size)
  group, deal = device_group(devices).local, processes.count() if share else 1
  total: int | None = None
  if isinstance(images, Images):
    edges = even_edges(len(images), batch_size, multiple=deal)
    total = len(range(processes.index() if share else 0, len(edges) - 1, deal))
    cut: Iterable[Any] = (functools.partial(read, images, *pair) for pair in itertools.pairwise(edges))
  else:
    cut = (functools.partial(np.asarray, batch, np.float32) for batch in images)
  own = itertools.islice(cut, processes.index(), None, deal) if share else cut

  def batches() -> Iterator[tuple[tuple[Any, ...], int]]:
    for load in own:
      pixels = load()
      if count := len(pixels):
        size = group.padded(count)
        weights = None if size == count else (np.arange(size) < count).astype(np.float32)
        yield (_padded(pixels, size), weights), count

  compiled = _compiled(_batch_of, step, group, tuple((options or {}).items()))
  walk = progress_bar(batches(), description, total=total, progress=progress)
  host = lambda found, count: Forwarded(group.by_device(found), count)
  return _results(compiled, constants, walk, group, host, should_stop, lambda forwarded: check(forwarded.found))


def _results(
  compiled: Callable[..., PyTree],
  constants: PyTree,
  batches: Iterable[tuple[tuple[Any, ...], int]],
  group: DeviceGroup,
  host: Callable[[PyTree, int], T],
  should_stop: Callable[[], bool],
  check: Callable[[T], str | None],
) -> Iterator[T]:
  """The loop itself: `host(compiled(constants, *batch), count)` of every batch, with one batch under way meanwhile."""
  placed, stopped, problem = group.replicate_constants(constants), False, None

  def started() -> Iterator[tuple[PyTree, int]]:
    nonlocal stopped
    for arrays, count in batches:
      yield compiled(placed, *group.shard(arrays)), count
      stopped = processes.stop_is_known(should_stop())
      if stopped:
        return

  # A pair is there when its second batch is on the devices; the last one has none behind it.
  for (found, count), _ in itertools.pairwise(itertools.chain(started(), [(None, 0)])):
    result = host(found, count)
    problem = check(result)
    if problem:
      break
    yield result
  # All processes meet here, so that all of them raise or none does.
  reports = processes.exchange([problem, stopped])
  for reported, _ in reports:
    if reported:
      raise NonFiniteError(reported)
  if processes.any_stop(any(report[1] for report in reports)):
    raise Interrupted("stopped while forwarding images")


@functools.lru_cache(maxsize=64)
def _compiled(
  form: Callable[..., Any], step: Callable[..., Any], group: DeviceGroup, options: tuple[tuple[str, Hashable], ...]
) -> Callable[..., PyTree]:
  return group.compile(form(step, group, dict(options)))


def _rows_of(step: Callable[..., Any], group: DeviceGroup, options: dict[str, Any]) -> Callable[..., PyTree]:
  def rows(constants: PyTree, *arrays: Array, axis_name: str | None) -> PyTree:
    return in_parts(group, functools.partial(step, constants, **options), *arrays)

  return rows


def _batch_of(step: Callable[..., Any], group: DeviceGroup, options: dict[str, Any]) -> Callable[..., PyTree]:
  return functools.partial(step, **options)


def padded_batches(images: Images, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
  """Batches f32[batch_size,h,w,c] on the host with the number of images in each; zeros pad the last one.

  This is for programs that are not JAX's, such as an exported file.
  """
  for start in range(0, len(images), batch_size):
    pixels = read(images, start, min(start + batch_size, len(images)))
    yield _padded(pixels, batch_size), len(pixels)


def check_batch_size(batch_size: int) -> None:
  """Refuse a batch that holds no image.

  Raises:
    DataError: the batch size is below 1.
  """
  if batch_size < 1:
    raise DataError(f"the batch size must be at least 1, found {batch_size}")


def read(images: Images, start: int, stop: int) -> np.ndarray:
  """Images start to stop - 1 as f32[n,h,w,c]. A data set decodes them here and not before."""
  if isinstance(images, ImageData):
    return images.read(np.arange(start, stop))
  return np.asarray(images[start:stop], np.float32)


def image_shape(images: Images) -> tuple[int, ...]:
  """(h, w, c)."""
  return images.image_shape if isinstance(images, ImageData) else tuple(images.shape[1:])


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
  return pad_batch(rows, None, size)[0]


def progress_bar(
  items: Iterable[T], description: str, *, unit: str = "batch", total: int | None = None, progress: bool = True
) -> Iterable[T]:
  """The items, with a progress bar in the main process if one is wanted."""
  return tqdm(items, desc=description, unit=unit, total=total, disable=not (progress and processes.is_main()))
