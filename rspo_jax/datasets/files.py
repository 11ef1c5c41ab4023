"""Reads JSONL and CSV files row by row, so that errors can name the line."""

import csv
import io
import json
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from rspo_jax.datasets import published

SUFFIXES = (".jsonl", ".json", ".csv")


def read_rows(path: str | pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (line number, row) of a JSONL or CSV file with a header.

  CSV cells stay text: the digits of a sudoku begin with zeros.

  Raises:
    ValueError: a missing or unreadable file, an unknown suffix, a line that is
      no JSON object, a CSV row with other columns than its header.
  """
  path = pathlib.Path(path).expanduser()
  suffix = path.suffix.lower()
  if suffix not in SUFFIXES:
    raise ValueError(
      f"data.source={path} has the suffix {suffix!r}; it must be one of"
      f" {', '.join(SUFFIXES)} (JSON files hold one object a line)."
    )
  try:
    text = path.read_text(encoding="utf-8-sig")
  except FileNotFoundError as error:
    raise ValueError(f"data.source={path} does not exist.") from error
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(
      f"data.source={path} cannot be read as UTF-8 text ({error})."
    ) from error
  yield from (_csv_rows if suffix == ".csv" else _json_rows)(path, text)


def _json_rows(path, text):
  # Not splitlines: JSON strings may hold line separators such as U+2028.
  for number, line in enumerate(text.split("\n"), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise ValueError(
        f"{path}:{number}: not a JSON object ({error})."
      ) from error
    if not isinstance(row, dict):
      raise ValueError(
        f"{path}:{number}: expected a JSON object, got"
        f" {type(row).__name__}: {line[:60]}"
      )
    yield number, row


def _csv_rows(path, text):
  reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
  try:
    for row in reader:
      if None in row or None in row.values():
        raise ValueError(
          f"{path}:{reader.line_num}: the row has another number of cells than"
          f" the header {','.join(reader.fieldnames)}."
        )
      yield reader.line_num, row
  except csv.Error as error:
    line = reader.reader.line_num
    raise ValueError(f"{path}:{line}: {error}.") from error


def load_rows(
  path: str | pathlib.Path, parse: Callable[[dict[str, Any]], Any]
) -> list[Any]:
  """Reads a file and parses each row.

  Args:
    path: JSONL or CSV file.
    parse: row -> example; raises ValueError with what was expected.

  Raises:
    ValueError: naming file and line, or an empty file.
  """
  examples = []
  for number, row in read_rows(path):
    try:
      examples.append(parse(row))
    except ValueError as error:
      raise ValueError(f"{path}:{number}: {error}") from error
  if not examples:
    raise ValueError(f"data.source={path} holds no rows.")
  return examples


def load_split(
  source: str, split: str, parse: Callable[[dict[str, Any]], Any]
) -> list[Any]:
  """Reads one split of a user's data.

  A source that holds `{split}` names one file a split. Of a single file, test
  is every row, as published test files want it; train and validation share the
  rows between them, one in 16 going to validation by its hash, the same
  examples always together. A published test file (`published`) is test alone.

  Args:
    source: path of a JSONL or CSV file, or NAME:PATH of a published one.
    split: train, validation or test.
    parse: row -> example; raises ValueError with what was expected.
  """
  name, _ = published.split_name(source)
  if name:
    if split != "test":
      raise ValueError(
        f"data.source={source!r} is a published test file, which the {split}"
        " split may not read; use it in --mode=eval with eval.split=test."
      )
    return load_rows(published.locate(source), parse)
  if "{split}" in source:
    return load_rows(source.replace("{split}", split), parse)
  examples = load_rows(source, parse)
  if split == "test":
    return examples
  held_out = [
    zlib.crc32(json.dumps(example, sort_keys=True).encode()) % 16 == 0
    for example in examples
  ]
  mine = [
    example
    for example, held in zip(examples, held_out, strict=True)
    if held == (split == "validation")
  ]
  if not mine:
    raise ValueError(
      f"data.source={source} has {len(examples)} rows, none of which falls to"
      f" {split}; give one file a split by writing {{split}} in the path."
    )
  return mine


def field(row: dict[str, Any], *names: str) -> Any:
  """Returns the first of the named fields that a row has."""
  for name in names:
    if name in row:
      return row[name]
  raise ValueError(
    f"expected a field {' or '.join(map(repr, names))}, got"
    f" {', '.join(map(repr, row)) or 'an empty object'}."
  )
