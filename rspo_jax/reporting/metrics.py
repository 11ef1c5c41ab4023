"""Writes what a run measures: one JSON line a step, TensorBoard, terminal.

`metrics.jsonl` holds one object a step, `step` first, in ascending order and
each step once: a row goes out in one write and is taken back when it could not
be written whole; a resumed run drops the rows past its checkpoint first
(`truncate_to`), a half-written last line among them.

On a terminal one live line shows bar, step, reward and its trend, accuracy,
calibration slope, tokens per second and time left; elsewhere plain lines come
at most every few seconds. Messages scroll above the line.

rich and tensorboardX are imported when first used: a command that fails on its
configuration should not wait for them.
"""

import collections
import contextlib
import json
import math
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

PLAIN_INTERVAL_S = 5.0
_REFRESH_PER_S = 4
_TREND_STEPS = 10
_TIMED_STEPS = 21
_PHASE_WORTH_SAYING_S = 0.5

_BAR_COLUMNS = (6, 30)

# Metric and how it is written on the progress line.
_SHOWN = (
  ("eval/accuracy", "accuracy {:.3f}"),
  ("calibration/slope", "slope {:.2f}"),
  ("rollout/tokens_per_s", "{:,.0f} tokens/s"),
)


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
    self._view = _View(
      total_steps, stream or sys.stdout, active and not quiet, debug, active
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
      self._view.update(step, finite)
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
    self._view.say(text)

  def warn(self, text: str) -> None:
    """Shows a message even when quiet."""
    self._view.say(text, always=True)

  def fail(self, error: object) -> None:
    """Ends the progress line and names what ended the run, on stderr."""
    self._view.close()
    print(f"error: {error}", file=sys.stderr, flush=True)

  def debug(self, text: str) -> None:
    """Shows a message at the debug level only."""
    self._view.say(text, debug=True)

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Shows what is going on, and afterwards how long it took."""
    with self._view.phase(name):
      yield

  def table(
    self, rows: Sequence[Mapping[str, Any]], title: str | None = None
  ) -> None:
    """Shows rows under the keys of the first one, unless quiet."""
    self._view.table(rows, title)

  def flush(self) -> None:
    """Brings the event files up to date; rows always are."""
    if self._events is not None:
      self._events.flush()

  def close(self) -> None:
    """Ends the progress line and closes the files."""
    self._view.close()
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


class _View:
  """What a person sees of a run."""

  def __init__(
    self,
    total_steps: int,
    stream: TextIO,
    shown: bool,
    debug: bool,
    active: bool,
  ):
    self._total_steps = total_steps
    self._stream = stream
    self._shown = shown
    self._debug = debug
    self._active = active
    self._live: Any = None
    self._console: Any = None
    self._phases: list[tuple[str, float]] = []
    self._step: int | None = None
    self._latest: dict[str, float] = {}
    self._rewards = collections.deque(maxlen=2 * _TREND_STEPS)
    self._step_times_s = collections.deque(maxlen=_TIMED_STEPS)
    self._last_update_s: float | None = None
    self._last_line_s = -math.inf
    self._pending = False
    self._terminal = shown and _is_terminal(stream)

  def update(self, step: int, metrics: Mapping[str, float]) -> None:
    """Takes note of a step; shows it when it is time."""
    if not self._shown:
      return
    now = time.monotonic()
    if self._last_update_s is not None:
      self._step_times_s.append(now - self._last_update_s)
    self._last_update_s = now
    self._step = step
    self._latest.update(metrics)
    if "reward/mean" in metrics:
      self._rewards.append(metrics["reward/mean"])
    if self._terminal:
      self._start()
      return
    self._pending = True
    last = step >= self._total_steps
    if last or now - self._last_line_s >= PLAIN_INTERVAL_S:
      self._last_line_s = now
      self._show_pending()

  def _show_pending(self) -> None:
    if self._pending:
      self._pending = False
      self._print("  ".join(self._parts()))

  def say(self, text: str, always: bool = False, debug: bool = False) -> None:
    if not self._active or not (self._shown or always):
      return
    if debug and not self._debug:
      return
    self._print(text)

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    start_s = time.monotonic()
    self._phases.append((name, start_s))
    if self._terminal:
      self._start()
    else:
      self.say(f"{name} ...")
    try:
      yield
    finally:
      self._phases.pop()
      took_s = time.monotonic() - start_s
      # Time in a phase is not the step's: it would spoil the time left.
      if self._last_update_s is not None:
        self._last_update_s += took_s if not self._phases else 0.0
      if took_s >= _PHASE_WORTH_SAYING_S:
        self.say(f"{name}: {took_s:.1f} s")

  def table(self, rows: Sequence[Mapping[str, Any]], title: str | None) -> None:
    if not rows or not self._shown:
      return
    header = list(rows[0])
    cells = [[_cell(row[key]) for key in header] for row in rows]
    if not self._terminal:
      lines = [title] if title else []
      self._print("\n".join([*lines, *_aligned([header, *cells])]))
      return
    import rich.box
    import rich.table
    import rich.text

    table = rich.table.Table(
      title=title, box=rich.box.SIMPLE_HEAD, title_justify="left"
    )
    for column, name in enumerate(header):
      table.add_column(name, justify="right" if column else "left")
    for row in cells:
      table.add_row(*(rich.text.Text(cell) for cell in row))
    self._console_now().print(table)

  def close(self) -> None:
    self._show_pending()
    if self._live is not None:
      self._live.stop()
    self._live = None
    self._terminal = False  # what comes now is plain

  def _print(self, text: str) -> None:
    if self._terminal:
      import rich.text

      # As text: brackets in a completion are no markup.
      self._console_now().print(rich.text.Text(text), soft_wrap=True)
    else:
      self._stream.write(text + "\n")
      self._stream.flush()

  def _console_now(self) -> Any:
    if self._console is None:
      import rich.console

      self._console = rich.console.Console(file=self._stream, highlight=False)
    return self._console

  def _start(self) -> None:
    """Starts the live line, which from then on refreshes itself."""
    if self._live is not None:
      return
    import rich.live

    self._live = rich.live.Live(
      console=self._console_now(),
      get_renderable=self._render,
      refresh_per_second=_REFRESH_PER_S,
      redirect_stdout=False,
      redirect_stderr=False,
    )
    self._live.start()

  def _render(self) -> Any:
    """Builds the live line; called from rich's thread."""
    import rich.progress_bar
    import rich.table
    import rich.text

    parts = self._parts() if self._step is not None else []
    phases = list(self._phases)
    if phases:
      name, start_s = phases[-1]
      parts.insert(0, f"{name} {time.monotonic() - start_s:.0f} s")
    text = "  ".join(parts)
    # The bar takes what the figures leave.
    room = self._console_now().width - len(text) - 3
    width = max(_BAR_COLUMNS[0], min(_BAR_COLUMNS[1], room))
    grid = rich.table.Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=width)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    grid.add_row(
      rich.progress_bar.ProgressBar(
        total=max(1, self._total_steps), completed=self._step or 0, width=width
      ),
      rich.text.Text(text),
    )
    return grid

  def _parts(self) -> list[str]:
    """Puts the latest figures into words, the most wanted first."""
    parts = [f"step {self._step}/{self._total_steps}"]
    if self._step_times_s:
      step_s = statistics.median(list(self._step_times_s))
      left_s = step_s * max(0, self._total_steps - self._step)
      parts.append(f"{_duration(left_s)} left")
    if self._rewards:
      parts.append(_trend(list(self._rewards)))
    for key, form in _SHOWN:
      if key in self._latest:
        parts.append(form.format(self._latest[key]))
    return parts


def _is_terminal(stream: TextIO) -> bool:
  if os.environ.get("TERM", "") == "dumb":
    return False
  try:
    return stream.isatty()
  except (AttributeError, ValueError):
    return False


def _trend(rewards: list[float]) -> str:
  """Writes the mean of the last steps and how it moved since those before."""
  recent = rewards[-_TREND_STEPS:]
  before = rewards[:-_TREND_STEPS]
  mean = statistics.fmean(recent)
  if not before:
    return f"reward {mean:.3f}"
  return f"reward {mean:.3f} ({mean - statistics.fmean(before):+.3f})"


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02d}:{seconds:02d}"
  return f"{minutes}:{seconds:02d}"


def _cell(value: Any) -> str:
  if isinstance(value, float):
    return f"{value:.4g}"
  return "" if value is None else str(value)


def _aligned(rows: Iterable[Sequence[str]]) -> list[str]:
  """Sets a table in columns: the first to the left, others to the right."""
  rows = list(rows)
  widths = [
    max(len(cell) for cell in column) for column in zip(*rows, strict=True)
  ]
  return [
    "  ".join(
      cell.rjust(width) if index else cell.ljust(width)
      for index, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]


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
  descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
  try:
    with os.fdopen(descriptor, "wb") as kept, path.open("rb") as file:
      for number, line in enumerate(file, 1):
        row = _parse_row(line)
        if row is None:
          messages.append(f"{path}: line {number} was damaged and is dropped.")
        elif last < row["step"] <= step:
          last = row["step"]
          kept.write(line)
      kept.flush()
      os.fsync(kept.fileno())
    os.chmod(name, path.stat().st_mode & 0o777)
    os.replace(name, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.unlink(name)
    raise
  return messages
