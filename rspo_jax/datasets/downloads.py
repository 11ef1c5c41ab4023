"""Fetches the canonical files of GSM8K and MATH, once.

1. A file is downloaded to the data folder under a temporary name, checked (by
   digest, or by its number of rows) and then put in its place, so that what is
   there is whole.
2. Train and validation share the published training file; the published test
   file is test.

Sources: Cobbe et al. 2021 (github.com/openai/grade-school-math); Hendrycks et
al. 2021 in the split of Lightman et al. 2023, whose 500 test problems are
MATH500 (github.com/openai/prm800k).
"""

import dataclasses
import hashlib
import pathlib
import urllib.error
import urllib.request

from rspo_jax.datasets import folders
from rspo_jax.storage import files

TIMEOUT_S = 30.0

_GSM8K = (
  "https://raw.githubusercontent.com/openai/grade-school-math/master/"
  "grade_school_math/data/"
)
_MATH = "https://github.com/openai/prm800k/raw/main/prm800k/math_splits/"


@dataclasses.dataclass(frozen=True)
class File:
  """A published file.

  Attributes:
    url: where it is.
    rows: lines that are not empty.
    sha256: of its bytes; empty: not known, the rows are counted instead.
  """

  url: str
  rows: int
  sha256: str = ""


FILES: dict[str, dict[str, File]] = {
  "gsm8k": {
    "train": File(
      _GSM8K + "train.jsonl",
      7473,
      "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    ),
    "test": File(
      _GSM8K + "test.jsonl",
      1319,
      "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    ),
  },
  "math500": {
    "train": File(_MATH + "train.jsonl", 12000),
    "test": File(_MATH + "test.jsonl", 500),
  },
}


def fetch(name: str, split: str, data_dir: str = "") -> pathlib.Path:
  """Returns the file that holds a split, downloaded if it was not.

  Args:
    name: key of FILES.
    split: train, validation or test.
    data_dir: see `folders.data_folder`.

  Raises:
    ValueError: it cannot be downloaded, or is not what it should be.
  """
  part = "test" if split == "test" else "train"
  file = FILES[name][part]
  folder = folders.data_folder(data_dir) / "downloads" / name
  path = folder / f"{part}.jsonl"
  with folders.exclusive(folder):
    if not path.exists():
      _download(file, path, name)
  return path


def _download(file: File, path: pathlib.Path, name: str) -> None:
  """Downloads one file to where it belongs."""
  remedy = (
    f"download it elsewhere and give data.source=PATH (with {{split}} in the"
    f" path for one file a split), or copy it to {path}."
  )
  try:
    with urllib.request.urlopen(file.url, timeout=TIMEOUT_S) as reply:
      content = reply.read()
    rows = sum(bool(line.strip()) for line in content.split(b"\n"))
    digest = hashlib.sha256(content).hexdigest()
    if file.sha256 and digest != file.sha256:
      raise ValueError(
        f"task.name={name}: {file.url} has the digest {digest[:16]}..., not"
        f" {file.sha256[:16]}... as the published file; {remedy}"
      )
    if rows != file.rows:
      raise ValueError(
        f"task.name={name}: {file.url} has {rows} rows, not the {file.rows} of"
        f" the published file; {remedy}"
      )
    files.write(path, content)
  except (OSError, urllib.error.URLError) as error:
    raise ValueError(
      f"task.name={name}: {file.url} cannot be downloaded"
      f" ({getattr(error, 'reason', error)}); {remedy}"
    ) from error
