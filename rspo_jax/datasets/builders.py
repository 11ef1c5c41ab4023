"""Generated datasets on disk: TFDS builders and a quick way to their columns.

1. A builder writes a generated dataset as array_record files, once per folder,
   size, seed and version; the same seed and version give the same bytes.
2. Beside it go the same columns as arrays. `load_columns` takes those: decoding
   half a million examples through the random-access data source takes half a
   minute, reading arrays a moment. Where they are missing or damaged the data
   source is read and they are written again.

TensorFlow is not needed, neither for writing nor for reading.
"""

import contextlib
import dataclasses
import io
import logging
import pathlib
import types
import zipfile
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from rspo_jax.datasets import countdown, folders, sudoku
from rspo_jax.storage import files

TRAIN_EXAMPLES = {"small": 16_384, "large": 500_000}
HELD_OUT_EXAMPLES = 4_096  # in validation, and as many in test

_READ_CHUNK = 8192


@dataclasses.dataclass
class GeneratedConfig(tfds.core.BuilderConfig):
  """How much of a generated dataset, and from which seed.

  Attributes:
    size: key of TRAIN_EXAMPLES.
    seed: of the generator.
  """

  size: str = "small"
  seed: int = 0


def _config(size: str, seed: int) -> GeneratedConfig:
  """Returns the builder config of a size and seed."""
  name = size if seed == 0 else f"{size}_seed{seed}"
  return GeneratedConfig(
    name=name,
    description=f"{TRAIN_EXAMPLES[size]} training examples, seed {seed}",
    size=size,
    seed=seed,
  )


class _Generated(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """What the generated datasets share; `generator` is a module of this package."""

  generator: ClassVar[types.ModuleType]
  features: ClassVar[dict]

  def __init__(self, **options):
    self.columns_by_split = {}  # filled while the dataset is being written
    super().__init__(**options)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      features=tfds.features.FeaturesDict(self.features),
      # Examples keep the generator's order, in which a smaller training split
      # is the beginning of a larger one.
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {
      "train": self._generate_examples(
        "train", TRAIN_EXAMPLES[self.builder_config.size]
      ),
      "validation": self._generate_examples("validation", HELD_OUT_EXAMPLES),
      "test": self._generate_examples("test", HELD_OUT_EXAMPLES),
    }

  def _generate_examples(self, split, count):
    columns = self.generator.generate(
      self.builder_config.seed, split, count
    ).columns()
    self.columns_by_split[split] = columns
    names = tuple(columns)
    for index, row in enumerate(zip(*columns.values(), strict=True)):
      yield index, dict(zip(names, row, strict=True))


class RspoCountdown(_Generated):
  """Countdown with three numbers in 1..100 and a reachable target in 10..100."""

  VERSION = tfds.core.Version(countdown.VERSION)
  generator: ClassVar = countdown
  features: ClassVar = {
    "numbers": tfds.features.Tensor(shape=(3,), dtype=np.int32),
    "target": np.int32,
    "solution": tfds.features.Text(),
  }


class RspoSudoku(_Generated):
  """4x4 sudoku with exactly one solution and 6 to 11 empty cells."""

  VERSION = tfds.core.Version(sudoku.VERSION)
  generator: ClassVar = sudoku
  features: ClassVar = {
    "puzzle": tfds.features.Text(),
    "solution": tfds.features.Text(),
  }


BUILDERS = {"countdown": RspoCountdown, "sudoku": RspoSudoku}


def prepare(name: str, size: str, seed: int, data_dir: str = ""):
  """Returns the builder of a generated dataset, written to disk if it was not.

  Args:
    name: key of BUILDERS.
    size: key of TRAIN_EXAMPLES.
    seed: of the generator.
    data_dir: see `folders.data_folder`.
  """
  if size not in TRAIN_EXAMPLES:
    raise ValueError(
      f"data.size={size!r} does not exist; use one of"
      f" {', '.join(TRAIN_EXAMPLES)}."
    )
  if not 0 <= seed < 2**32:
    raise ValueError(f"data.seed={seed} must be in 0..2^32-1.")
  folder = folders.data_folder(data_dir)
  with folders.exclusive(folder), _quiet():
    builder = BUILDERS[name](
      data_dir=str(folder),
      config=_config(size, seed),
      file_format="array_record",
    )
    builder.download_and_prepare()
    for split, columns in builder.columns_by_split.items():
      _save_columns(_columns_path(builder, split), columns)
  return builder


def _columns_path(builder, split: str) -> pathlib.Path:
  return pathlib.Path(builder.data_path) / f"columns-{split}.npz"


def _save_columns(path: pathlib.Path, columns) -> None:
  """Writes columns as arrays, or leaves it where the disk refuses."""
  # Only a shortcut for the next start: a full or read-only disk is no reason to
  # stop here.
  with contextlib.suppress(OSError), files.replacing(path) as handle:
    np.savez(handle, **columns)


@contextlib.contextmanager
def _quiet():
  """Keeps the dataset library's talk off stdout, which belongs to results."""
  tfds.disable_progress_bar()
  logger = logging.getLogger("absl")
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logger.setLevel(level)


def load_columns(
  name: str, split: str, size: str, seed: int, data_dir: str = ""
) -> dict[str, np.ndarray]:
  """Returns the columns of a split, texts as fixed-width byte strings.

  Args:
    name: key of BUILDERS.
    split: train, validation or test.
    size: key of TRAIN_EXAMPLES.
    seed: of the generator.
    data_dir: see `folders.data_folder`.
  """
  builder = prepare(name, size, seed, data_dir)
  cache = _columns_path(builder, split)
  damaged = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile)
  with (
    contextlib.suppress(*damaged),
    np.load(cache, allow_pickle=False) as stored,
  ):
    # Members carry a checksum, so a damaged file does not pass.
    return {key: stored[key] for key in stored.files}
  columns = _read(builder, split)
  _save_columns(cache, columns)
  return columns


def _read(builder, split: str) -> dict[str, np.ndarray]:
  """Decodes a split through its data source."""
  try:
    source = builder.as_data_source(split)
    rows = []
    for start in range(0, len(source), _READ_CHUNK):
      stop = min(start + _READ_CHUNK, len(source))
      rows.extend(source.__getitems__(range(start, stop)))
  except (OSError, RuntimeError, ValueError) as error:
    raise ValueError(
      f"the prepared dataset {builder.data_path} cannot be read ({error});"
      " delete that folder and start again: it is generated anew."
    ) from error
  columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
  # Scalars come back as Python integers.
  return {
    name: column.astype(np.int32) if column.dtype.kind == "i" else column
    for name, column in columns.items()
  }
