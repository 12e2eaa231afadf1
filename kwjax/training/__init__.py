"""Training a network on labelled images: for reference networks whose weights are not public."""

from kwjax.training.run import train, train_with_history
from kwjax.training.step import TrainConfig, TrainState, initial_variables, train_step

__all__ = ["TrainConfig", "TrainState", "initial_variables", "train", "train_step", "train_with_history"]
