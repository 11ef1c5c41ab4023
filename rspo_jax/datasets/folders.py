"""Where prepared and downloaded data is kept."""

import os
import pathlib


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
