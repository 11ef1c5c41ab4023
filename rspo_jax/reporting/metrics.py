"""Writes what a run measures: one JSON line a step, TensorBoard, trackers.

`metrics.jsonl` holds one object a step, `step` first, in ascending order and
each step once: a row goes out in one write and is taken back when it could not
be written whole; a resumed run drops the rows past its checkpoint first
(`truncate_to`), a half-written last line among them.

tensorboardX is imported when first used: a command that fails on its
configuration should not wait for it.
"""

import contextlib
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from rspo_jax.reporting import terminal
from rspo_jax.storage import files


class MetricsError(Exception):
  """Metrics could not be written; names the path and the remedy."""


class NonFiniteMetric(ArithmeticError):
  """A metric is NaN or infinite; its row was written with null in its place.

  Attributes:
    step: step of the row.
    keys: names of the metrics that are not finite.
  """

  def __init__(self, step: int, values: Mapping[str, float]):
    self.step = step
    self.keys = tuple(values)
    listed = ", ".join(f"{key} = {value}" for key, value in values.items())
    super().__init__(f"Step {step} is not finite: {listed}.")


class MetricsWriter:
  """Writes the metrics of one run and shows how it is going.

  For one thread; in a run of several processes only one of them is `active`.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    total_steps: int,
    tensorboard: bool = True,
    quiet: bool = False,
    *,
    debug: bool = False,
    active: bool = True,
    stream: TextIO | None = None,
  ):
    """Prepares; nothing is written before the first row.

    Args:
      workdir: folder of the run, local; gets `metrics.jsonl`, `tensorboard/`.
      total_steps: steps of the whole run, for the bar and the time left.
      tensorboard: also write event files.
      quiet: show warnings only.
      debug: also show what goes to `debug`.
      active: False writes and shows nothing but still checks values, so that
        all processes stop at the same step.
      stream: where to show; standard output by default.
    """
    self.path = pathlib.Path(workdir) / "metrics.jsonl"
    self._tensorboard_folder = pathlib.Path(workdir) / "tensorboard"
    self._with_tensorboard = tensorboard and active
    self._active = active
    self._file: int | None = None
    self._size_bytes = 0
    self._last_step: int | None = None
    self._purge_step: int | None = None
    self._events: Any = None
    self._trackers: Any = None
    level = terminal.DETAILS if debug else terminal.MESSAGES
    if quiet:
      level = terminal.WARNINGS
    self._terminal = terminal.Terminal(
      total_steps, stream or sys.stdout, level if active else terminal.SILENT
    )

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Appends the row of one step.

    Args:
      step: number of the step; higher than that of any row there.
      metrics: value by `group/name`; Python or numpy numbers.

    Raises:
      NonFiniteMetric: a value is NaN or infinite; the row is written all the
        same, with null in its place.
      MetricsError: the row could not be written; nothing of it remains.
      ValueError: the step has a row already, or a metric is called "step".
      TypeError: a value is no number.
    """
    if "step" in metrics:
      raise ValueError('No metric may be called "step": it is the first field.')
    step = int(step)
    values = {key: _number(key, value) for key, value in metrics.items()}
    bad = {key: v for key, v in values.items() if not math.isfinite(v)}
    finite = {key: v for key, v in values.items() if key not in bad}
    if self._active:
      row = {"step": step}
      row.update({k: None if k in bad else v for k, v in values.items()})
      self._append(step, json.dumps(row, allow_nan=False).encode() + b"\n")
      if self._with_tensorboard:
        self._add_scalars(step, finite)
      if self._trackers is not None:
        self._trackers.each("scalars", step, finite)
      self._terminal.update(step, finite)
    if bad:
      raise NonFiniteMetric(step, bad)

  def attach(self, trackers: Any) -> None:
    """Sends rows, histograms and texts to `trackers.Trackers` too."""
    self._trackers = trackers

  def truncate_to(self, step: int) -> list[str]:
    """Drops the rows past a step, before a run continues from there.

    Args:
      step: last step to keep; -1 keeps none.

    Returns:
      One line for whatever was found damaged and dropped.

    Raises:
      MetricsError: the file could not be rewritten; it is as it was.
    """
    self._purge_step = step + 1
    if not self._active:
      return []
    self._close_file()
    self._close_events()
    try:
      return _truncate(self.path, step)
    except OSError as error:
      raise self._write_error(error) from error

  def histogram(self, step: int, name: str, values: Any) -> None:
    """Adds a distribution to TensorBoard; values that are not finite go."""
    if not self._with_tensorboard and self._trackers is None:
      return
    import numpy as np

    values = np.asarray(values, np.float64).ravel()
    values = values[np.isfinite(values)]
    if values.size and self._with_tensorboard:
      self._open_events().add_histogram(name, values, step)
    if values.size and self._trackers is not None:
      self._trackers.each("histogram", step, name, values)

  def text(self, step: int, name: str, text: str) -> None:
    """Adds a text, as it stands, to TensorBoard."""
    if self._with_tensorboard:
      # TensorBoard renders Markdown; indented text is shown verbatim.
      verbatim = "\n".join("    " + line for line in text.splitlines())
      self._open_events().add_text(name, verbatim, step)
    if self._trackers is not None:
      self._trackers.each("text", step, name, text)

  def say(self, text: str) -> None:
    """Shows a message above the progress line, unless quiet."""
    self._terminal.say(text)

  def warn(self, text: str) -> None:
    """Shows a message even when quiet."""
    self._terminal.say(text, terminal.WARNINGS)

  def fail(self, error: object) -> None:
    """Ends the progress line and names what ended the run, on stderr."""
    self._terminal.close()
    print(f"error: {error}", file=sys.stderr, flush=True)

  def debug(self, text: str) -> None:
    """Shows a message at the debug level only."""
    self._terminal.say(text, terminal.DETAILS)

  def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
    """Shows what is going on, and afterwards how long it took."""
    return self._terminal.phase(name)

  def table(
    self, rows: Sequence[Mapping[str, Any]], title: str | None = None
  ) -> None:
    """Shows rows under the keys of the first one, unless quiet."""
    self._terminal.table(rows, title)

  def flush(self) -> None:
    """Brings the event files up to date; rows always are."""
    if self._events is not None:
      self._events.flush()

  def close(self) -> None:
    """Ends the progress line and closes the files."""
    self._terminal.close()
    self._close_file()
    self._close_events()
    if self._trackers is not None:
      self._trackers.each("close")
      self._trackers = None

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _append(self, step: int, line: bytes) -> None:
    """Writes a line whole or not at all."""
    try:
      if self._file is None:
        self._open_file()
      if self._last_step is not None and step <= self._last_step:
        raise ValueError(
          f"{self.path} already has a row of step {self._last_step}; "
          f"truncate_to({step - 1}) before step {step} is written again."
        )
      try:
        rest = line
        while rest:  # a full disk may take a part before it says so
          rest = rest[os.write(self._file, rest) :]
      except OSError:
        # Half a row would make the next one unreadable, too.
        with contextlib.suppress(OSError):
          os.ftruncate(self._file, self._size_bytes)
        raise
    except OSError as error:
      raise self._write_error(error) from error
    self._size_bytes += len(line)
    self._last_step = step

  def _open_file(self) -> None:
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    self._last_step, self._size_bytes = _last_row(self.path)
    os.ftruncate(self._file, self._size_bytes)

  def _close_file(self) -> None:
    if self._file is not None:
      os.close(self._file)
    self._file = None

  def _open_events(self) -> Any:
    if self._events is None:
      import tensorboardX

      try:
        self._events = tensorboardX.SummaryWriter(
          str(self._tensorboard_folder), purge_step=self._purge_step
        )
      except OSError as error:
        raise self._write_error(error) from error
    return self._events

  def _add_scalars(self, step: int, values: Mapping[str, float]) -> None:
    """One event a row: each handed to the writing thread is a wait for it."""
    from tensorboardX.proto import summary_pb2

    writer = self._open_events().file_writer
    row = summary_pb2.Summary(
      value=[
        summary_pb2.Summary.Value(tag=key, simple_value=value)
        for key, value in values.items()
      ]
    )
    writer.add_summary(row, step)

  def _close_events(self) -> None:
    if self._events is not None:
      self._events.close()
    self._events = None

  def _write_error(self, error: OSError) -> MetricsError:
    return MetricsError(
      f"Metrics could not be written to {self.path.parent}: {error}. Make room "
      "or make the folder writable, then run the same command again."
    )


def read_rows(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
  """Yields the rows of a `metrics.jsonl`, skipping lines that are no rows."""
  path = pathlib.Path(path)
  if not path.exists():
    return
  with path.open("rb") as file:
    for line in file:
      row = _parse_row(line)
      if row is not None:
        yield row


def _number(key: str, value: Any) -> float | int:
  """Turns a scalar of any library into a Python number."""
  if hasattr(value, "item") and getattr(value, "shape", None) == ():
    value = value.item()
  if isinstance(value, bool):
    return int(value)
  if isinstance(value, int | float):
    return value
  raise TypeError(
    f"Metric {key} is a {type(value).__name__}, not a number: reduce it to one."
  )


def _parse_row(line: bytes) -> dict[str, Any] | None:
  """Reads one line; None when it is not a whole row."""
  if not line.endswith(b"\n"):
    return None
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    return None
  if not isinstance(row, dict) or type(row.get("step")) is not int:
    return None
  return row


def _last_row(path: pathlib.Path) -> tuple[int | None, int]:
  """Returns the highest step and the length of all whole lines in bytes."""
  last, size = None, 0
  with path.open("rb") as file:
    for line in file:
      if not line.endswith(b"\n"):
        break
      size += len(line)
      row = _parse_row(line)
      if row is not None:
        last = row["step"] if last is None else max(last, row["step"])
  return last, size


def _truncate(path: pathlib.Path, step: int) -> list[str]:
  """Rewrites a file with its rows up to a step, each step once."""
  if not path.exists():
    return []
  messages = []
  last = -math.inf
  with files.replacing(path) as kept, path.open("rb") as file:
    for number, line in enumerate(file, 1):
      row = _parse_row(line)
      if row is None:
        messages.append(f"{path}: line {number} was damaged and is dropped.")
      elif last < row["step"] <= step:
        last = row["step"]
        kept.write(line)
  return messages
