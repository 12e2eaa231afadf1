"""A small network and labelled images on disk, for the runs of several processes."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from kwjax.models import get_model
from kwjax.network import Network, save_network
from tests.networks import random_network

SHAPE = (8, 8, 3)


def small_network() -> Network:
  """A convolution, BatchNorm and a classifier on 8x8 images with random weights and statistics."""
  options = {"num_classes": 5, "blocks_per_stage": 0}
  shaken = random_network(get_model("resnet20", **options), image_shape=SHAPE)
  return shaken.replace(name="small", arch="resnet20", model_options=options)


def write_inputs(folder: pathlib.Path) -> None:
  """`network/` and `data.npz` of 11 images, labelled by the network itself but for the last three."""
  network = small_network()
  save_network(network, folder / "network")
  images = (np.asarray(jax.random.uniform(jax.random.key(0), (11, *SHAPE))) * 255).astype(np.uint8)
  labels = np.array(jnp.argmax(network.apply(jnp.asarray(images / 255, jnp.float32)), -1))
  labels[-3:] = (labels[-3:] + 1) % 5
  np.savez(folder / "data.npz", images=images, labels=labels)
