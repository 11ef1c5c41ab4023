"""Where prepared and downloaded data is kept."""

import contextlib
import os
import pathlib

from rspo_jax.storage import files


def data_folder(data_dir: str = "") -> pathlib.Path:
  """Returns the folder of prepared datasets.

  The setting comes first, then the environment variable RSPO_JAX_DATA, then
  ~/.cache/rspo_jax/datasets.
  """
  chosen = (
    data_dir
    or os.environ.get("RSPO_JAX_DATA", "")
    or "~/.cache/rspo_jax/datasets"
  )
  return pathlib.Path(chosen).expanduser()


@contextlib.contextmanager
def exclusive(folder: pathlib.Path):
  """Lets one process at a time prepare data in a folder, made if need be.

  Raises:
    ValueError: it cannot be written.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    handle = open(folder / ".lock", "a")  # noqa: SIM115
  except OSError as error:
    raise ValueError(
      f"data.dir={folder} cannot be written ({error.strerror}); set"
      " data.dir or the environment variable RSPO_JAX_DATA to a folder"
      " that can."
    ) from error
  with handle:
    files.lock(handle, wait=True)
    yield
