"""The test files that other programs published, by name.

`data.source=NAME:PATH` is one of `FILES`; PATH is the file itself or a folder
that holds it, such as a clone of the repository. They are test files: neither
training nor the choice of settings may see them, so no other split reads them.
"""

import dataclasses
import pathlib


@dataclasses.dataclass(frozen=True)
class File:
  """A published test file.

  Attributes:
    task: the task whose rows it holds.
    names: what the file is called, where it was published and in copies.
    rows: how many it has.
    origin: who published it.
  """

  task: str
  names: tuple[str, ...]
  rows: int
  origin: str


FILES: dict[str, File] = {
  "d1_countdown": File(
    "countdown",
    ("countdown_cd3_test.jsonl",),
    256,
    "d1 (dllm-reasoning/d1, dataset/)",
  ),
  "d1_sudoku": File(
    "sudoku",
    ("4x4_test_sudoku.csv", "sudoku4x4_test_d1.csv"),
    500,
    "d1 (dllm-reasoning/d1, dataset/)",
  ),
  "spg_sudoku": File(
    "sudoku",
    ("test_sudoku_split_new.csv", "sudoku4x4_test_spg_new.csv"),
    256,
    "SPG (facebookresearch/SPG, dataset/)",
  ),
}


def split_name(source: str) -> tuple[str, str]:
  """(name, path) of a source that names a published file, else ("", source)."""
  name, colon, path = source.partition(":")
  return (name, path) if colon and name in FILES else ("", source)


def locate(source: str) -> pathlib.Path:
  """Returns the path of a source that names a published file.

  Raises:
    ValueError: it is not there.
  """
  name, path = split_name(source)
  file = FILES[name]
  given = pathlib.Path(path).expanduser()
  if given.is_file():
    return given
  for folder in (given, given / "dataset", given / "data"):
    for candidate in file.names:
      if (folder / candidate).is_file():
        return folder / candidate
  raise ValueError(
    f"data.source={source!r}: {file.names[0]} of {file.origin} is neither"
    f" {path!r} nor in that folder or its dataset/; give the file or a clone."
  )
