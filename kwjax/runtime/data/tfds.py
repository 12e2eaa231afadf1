"""tensorflow-datasets, and what it needs to read and write without TensorFlow but does not declare."""

from kwjax.optional import require

for _name in ("importlib_resources", "array_record"):
  require(_name, extra="tfds", purpose="a data set of tensorflow-datasets")

import tensorflow_datasets as tfds  # noqa: E402
from tensorflow_datasets.core import dataset_info as dataset_info  # noqa: E402
from tensorflow_datasets.core import example_serializer as example_serializer  # noqa: E402
from tensorflow_datasets.core import naming as naming  # noqa: E402

tfds = tfds
