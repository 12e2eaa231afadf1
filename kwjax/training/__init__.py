"""Training a network on labelled images: for reference networks whose weights are not public."""

from kwjax.training.run import train, train_with_history
from kwjax.training.step import TrainConfig, initial_variables, train_step

__all__ = ["TrainConfig", "initial_variables", "train", "train_step", "train_with_history"]
