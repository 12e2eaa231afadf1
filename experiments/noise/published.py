"""What Raikwar & Mishra (2022) published of distillation from noise, top-1 (%) on CIFAR-10, by student."""

from __future__ import annotations

from experiments.noise.student import DEAD_LEAVES, GAUSSIAN

BATCH_SIZES = (32, 64, 128, 256, 512)
# Published, CIFAR-10, teacher ResNet-34 (93.29) or, for the last two, a larger network of the student's kind.
BY_SHARE: dict[str, dict[tuple[str, float], float]] = {
  "resnet18_cifar": {
    (GAUSSIAN, 1.0): 13.49,
    (GAUSSIAN, 0.0): 85.98,
    (DEAD_LEAVES, 0.9): 18.26,
    (DEAD_LEAVES, 0.75): 57.73,
    (DEAD_LEAVES, 0.5): 79.54,
    (DEAD_LEAVES, 0.25): 82.24,
    (DEAD_LEAVES, 0.0): 89.4,
  },
  "wrn28_10": {(GAUSSIAN, 0.0): 88.12, (DEAD_LEAVES, 0.0): 90.75},
  "mobilenet_v2_cifar": {(GAUSSIAN, 0.0): 82.47, (DEAD_LEAVES, 0.0): 86.94},
}
BY_BATCH = {"resnet18_cifar": dict(zip(BATCH_SIZES, (88.09, 88.21, 89.35, 89.40, 89.19)))}
