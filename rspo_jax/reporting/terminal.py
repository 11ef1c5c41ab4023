"""What a person sees of a run, on a terminal or in a log.

On a terminal one live line shows bar, step, reward and its trend, accuracy,
calibration slope, tokens per second and time left; elsewhere plain lines come
at most every few seconds. Messages scroll above the line.

rich is imported when first used: a command that fails on its configuration
should not wait for it.
"""

import collections
import contextlib
import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

# What is shown, each with what stands before it.
SILENT, WARNINGS, MESSAGES, DETAILS = range(4)
PLAIN_INTERVAL_S = 5.0
_REFRESH_PER_S = 4
_TREND_STEPS = 10
_TIMED_STEPS = 21
_PHASE_WORTH_SAYING_S = 0.5
_PLAIN_COLUMNS = 1000  # a log wraps no table

# Metric and how it is written on the progress line.
_SHOWN = (
  ("eval/accuracy", "accuracy {:.3f}"),
  ("calibration/slope", "slope {:.2f}"),
  ("rollout/tokens_per_s", "{:,.0f} tokens/s"),
)


class Terminal:
  """Shows how a run is going; for one thread."""

  def __init__(self, total_steps: int, stream: TextIO, level: int):
    """Prepares; nothing is shown yet.

    Args:
      total_steps: steps of the whole run, for the bar and the time left.
      stream: where to show.
      level: SILENT, WARNINGS, MESSAGES or DETAILS.
    """
    self._total_steps = total_steps
    self._stream = stream
    self._level = level
    self._console: Any = None
    self._progress: Any = None
    self._phases: list[tuple[str, float]] = []
    self._step: int | None = None
    self._latest: dict[str, float] = {}
    self._rewards = collections.deque(maxlen=2 * _TREND_STEPS)
    self._step_times_s = collections.deque(maxlen=_TIMED_STEPS)
    self._last_update_s: float | None = None
    self._last_line_s = -math.inf
    self._pending = False
    self._live = level >= MESSAGES and _is_terminal(stream)

  def update(self, step: int, metrics: Mapping[str, float]) -> None:
    """Takes note of a step; shows it when it is time."""
    if self._level < MESSAGES:
      return
    now = time.monotonic()
    if self._last_update_s is not None:
      self._step_times_s.append(now - self._last_update_s)
    self._last_update_s = now
    self._step = step
    self._latest.update(metrics)
    if "reward/mean" in metrics:
      self._rewards.append(metrics["reward/mean"])
    if self._live:
      self._start()
      self._progress.update(self._progress.task_ids[0], completed=step)
      return
    self._pending = True
    last = step >= self._total_steps
    if last or now - self._last_line_s >= PLAIN_INTERVAL_S:
      self._last_line_s = now
      self._show_pending()

  def say(self, text: str, level: int = MESSAGES) -> None:
    """Shows a message of a level, above the live line."""
    if level > self._level:
      return
    if self._live:
      import rich.text

      # As text: brackets in a completion are no markup.
      self._console_now().print(rich.text.Text(text), soft_wrap=True)
    else:
      self._stream.write(text + "\n")
      self._stream.flush()

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Shows what is going on, and afterwards how long it took."""
    start_s = time.monotonic()
    self._phases.append((name, start_s))
    if self._live:
      self._start()
    else:
      self.say(f"{name} ...")
    try:
      yield
    finally:
      self._phases.pop()
      took_s = time.monotonic() - start_s
      # Time in a phase is not the step's: it would spoil the time left.
      if self._last_update_s is not None and not self._phases:
        self._last_update_s += took_s
      if took_s >= _PHASE_WORTH_SAYING_S:
        self.say(f"{name}: {took_s:.1f} s")

  def table(
    self, rows: Sequence[Mapping[str, Any]], title: str | None = None
  ) -> None:
    """Shows rows under the keys of the first one."""
    if not rows or self._level < MESSAGES:
      return
    import rich.box
    import rich.table
    import rich.text

    table = rich.table.Table(
      box=rich.box.SIMPLE_HEAD if self._live else None,
      padding=(0, 1) if self._live else (0, 2, 0, 0),
      pad_edge=self._live,
    )
    for column, name in enumerate(rows[0]):
      table.add_column(name, justify="right" if column else "left")
    for row in rows:
      table.add_row(*(rich.text.Text(_cell(row[key])) for key in rows[0]))
    if title:
      self.say(title)
    self._console_now().print(table)

  def close(self) -> None:
    """Ends the live line; what comes after is plain."""
    self._show_pending()
    if self._progress is not None:
      self._progress.stop()
    self._progress = self._console = None
    self._live = False

  def _show_pending(self) -> None:
    if self._pending:
      self._pending = False
      self.say(self._figures())

  def _console_now(self) -> Any:
    if self._console is None:
      import rich.console

      self._console = rich.console.Console(
        file=self._stream,
        highlight=False,
        width=None if self._live else _PLAIN_COLUMNS,
      )
    return self._console

  def _start(self) -> None:
    """Starts the live line, which from then on refreshes itself."""
    if self._progress is not None:
      return
    from rich import progress, table, text

    class Figures(progress.ProgressColumn):
      """Called from rich's thread."""

      def render(column, _) -> text.Text:
        return text.Text(self._figures())

    self._progress = progress.Progress(
      progress.BarColumn(bar_width=None),  # takes what the figures leave
      Figures(table.Column(no_wrap=True, overflow="ellipsis")),
      console=self._console_now(),
      expand=True,
      refresh_per_second=_REFRESH_PER_S,
      redirect_stdout=False,
      redirect_stderr=False,
    )
    self._progress.add_task("", total=max(1, self._total_steps))
    self._progress.start()

  def _figures(self) -> str:
    """Puts the latest figures into words, the most wanted first."""
    parts = []
    for name, start_s in list(self._phases)[-1:]:
      if self._live:
        parts.append(f"{name} {time.monotonic() - start_s:.0f} s")
    if self._step is not None:
      parts.append(f"step {self._step}/{self._total_steps}")
    if self._step_times_s:
      step_s = statistics.median(list(self._step_times_s))
      left_s = step_s * max(0, self._total_steps - self._step)
      parts.append(f"{_duration(left_s)} left")
    if self._rewards:
      parts.append(_trend(list(self._rewards)))
    for key, form in _SHOWN:
      if key in self._latest:
        parts.append(form.format(self._latest[key]))
    return "  ".join(parts)


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
