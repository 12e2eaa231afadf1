"""Differentiable random views of a batch: crop and resize, zero-padded crop, flip, cutout."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kwjax.errors import KwjaxError
from kwjax.synthesis.resample import outside, resample

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """Augmentation that is drawn anew for every view at every step. The default changes nothing.

  Attributes:
    crop_resize: range of the relative area of a random crop, resized bilinearly to the full size; None is off.
      Haroush et al. (2020) give no numbers.
    pad_crop: pixels of zero padding before a random crop of the original size (4 at 32x32 is how CIFAR networks are
      trained); 0 is off.
    flip: mirror horizontally with probability 1/2.
    cutout: side of a square that is set to the input mean, relative to the image side; 0 is off.
    keep_first: leave the first view of every image unchanged, so that the images themselves get the right statistics.
  """

  crop_resize: tuple[float, float] | None = None
  pad_crop: int = 0
  flip: bool = False
  cutout: float = 0.0
  keep_first: bool = False

  def __post_init__(self) -> None:
    if self.crop_resize is not None:
      object.__setattr__(self, "crop_resize", tuple(self.crop_resize))
    if self.crop_resize is not None and not 0 < self.crop_resize[0] <= self.crop_resize[1] <= 1:
      raise KwjaxError(f"crop_resize must be a range of relative areas within (0, 1], found {self.crop_resize}")
    if self.pad_crop < 0 or not 0 <= self.cutout < 1:
      raise KwjaxError(f"pad_crop must be >= 0 and cutout in [0, 1), found {self.pad_crop} and {self.cutout}")

  @classmethod
  def paper(cls) -> Augmentation:
    """Random cutout, crop and resize, and flip: the set in Appendix A.1 of Haroush et al. (2020)."""
    return cls(crop_resize=(0.4, 1.0), flip=True, cutout=0.25)

  @classmethod
  def training(cls, image_size: int) -> Augmentation:
    """The usual training augmentation: padded crop and flip at CIFAR's size, random resized crop and flip above."""
    return cls(pad_crop=image_size // 8, flip=True) if image_size <= 64 else cls(crop_resize=(0.4, 1.0), flip=True)

  @property
  def is_identity(self) -> bool:
    """Whether every view equals its image."""
    return dataclasses.replace(self, keep_first=False) == Augmentation()


class Views(NamedTuple):
  """The random draws for a batch of views.

  Attributes:
    rows: f32[v,h], the image row that each row of the view samples; a position outside the image is zero padding.
    columns: f32[v,w], the same for columns; a flip reverses them.
    keep: f32[v,h,w], zero inside the cutout.
  """

  rows: Array
  columns: Array
  keep: Array


def draw_views(key: Array, indices: Array, height: int, width: int, config: Augmentation) -> Views:
  """Draw one view for every index. Index i gets the same view on any number of devices.

  Args:
    key: PRNG key of the step.
    indices: i32[v], index of each view within the whole batch.
    height: rows h.
    width: columns w.
    config: what to draw.
  """

  def one(index: Array) -> Views:
    area, y, x, pad_y, pad_x, mirror, cut_y, cut_x = jax.random.uniform(jax.random.fold_in(key, index), (8,))
    low, high = config.crop_resize or (1.0, 1.0)
    side = jnp.sqrt(low + (high - low) * area)
    flipped = (mirror < 0.5) & config.flip
    rows = _positions(height, side, y, pad_y, config.pad_crop)
    columns = _positions(width, side, x, pad_x, config.pad_crop)
    columns = jnp.where(flipped, columns[::-1], columns)
    inside_y = jnp.abs(jnp.arange(height) + 0.5 - cut_y * height) < config.cutout * height / 2
    inside_x = jnp.abs(jnp.arange(width) + 0.5 - cut_x * width) < config.cutout * width / 2
    return Views(rows, columns, 1.0 - inside_y[:, None] * inside_x[None, :])

  return jax.vmap(one)(indices)


def _positions(size: int, side: Array, position: Array, pad_position: Array, pad: int) -> Array:
  """f32[size], the positions that the rows of a bilinear crop and resize with a zero-padded crop sample."""
  out = jnp.arange(size, dtype=jnp.float32)
  if pad:
    out = out + jnp.floor(pad_position * (2 * pad + 1)) - pad
  centre = jnp.clip((out + 0.5) * side + position * (1.0 - side) * size - 0.5, 0.0, size - 1.0)
  return jnp.where((out >= 0) & (out < size), centre, outside(size))


def apply_views(images: Array, views: Views, fill: Array, config: Augmentation) -> Array:
  """Make the views of images; linear in the images.

  Args:
    images: f32[b,h,w,c].
    views: v views, v a multiple of b; views i*n .. i*n+n-1 are of image i.
    fill: f32[c], colour of the cutout.
    config: the augmentation that drew the views.

  Returns:
    f32[v,h,w,c].
  """
  per_image = views.rows.shape[0] // images.shape[0]
  repeated = jnp.repeat(images, per_image, axis=0) if per_image > 1 else images
  magnification = 1.0 if config.crop_resize is None else config.crop_resize[0] ** -0.5
  moved = resample(repeated, views.rows, views.columns, magnification)
  keep = views.keep[..., None]
  return moved * keep + fill * (1.0 - keep)


def augment(
  images: Array,
  key: Array,
  config: Augmentation,
  *,
  duplicates: int = 1,
  fill: Array | float = 0.0,
  offset: Array | int = 0,
) -> Array:
  """In-batch augmentation of Haroush et al. (2020), section 3.2: n independent views of every image.

  On large images (`kwjax.synthesis.resample`) only reverse-mode differentiation works.

  Args:
    images: f32[b,h,w,c] in [0,1].
    key: PRNG key of the step.
    config: what to draw.
    duplicates: number n of views of each image.
    fill: f32[c] or a number, colour of the cutout, in [0,1].
    offset: index of the first image within the whole batch over all devices.

  Returns:
    f32[b*n,h,w,c]; views of one image are neighbours.
  """
  if config.is_identity:
    return jnp.repeat(images, duplicates, axis=0) if duplicates > 1 else images
  b, h, w, c = images.shape
  indices = offset * duplicates + jnp.arange(b * duplicates)
  views = draw_views(key, indices, h, w, config)
  if config.keep_first:
    first = jnp.arange(b * duplicates) % duplicates == 0
    same = (jnp.arange(h, dtype=jnp.float32), jnp.arange(w, dtype=jnp.float32), jnp.ones(()))
    views = Views(
      *(jnp.where(first.reshape(-1, *[1] * (drawn.ndim - 1)), s, drawn) for s, drawn in zip(same, views, strict=True))
    )
  return apply_views(images, views, jnp.broadcast_to(jnp.asarray(fill, images.dtype), (c,)), config)
