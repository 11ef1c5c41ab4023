"""A JAX profile of a few steps, and what cost the most in them.

`run.profile=STEPS` traces that many steps after the first one, which compiles.
The trace goes to the run's `profile/` (TensorBoard's profile plugin, or
xprof, opens it); `costs` reads it at once:

1. Events that are operations of a compiled program: those with an `hlo_op`,
   or on an accelerator's line "XLA Ops".
2. Their own time, less that of the operations inside them (a `while` contains
   its body), summed over threads and devices.
3. By program and kind of operation (`dot.12` and `dot.7` are `dot`).
"""

import collections
import contextlib
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

TOP = 10
_OPS_LINE = "XLA Ops"


class Profiler:
  """Traces some steps of a run, once."""

  def __init__(
    self,
    folder: pathlib.Path,
    steps: int,
    report: Callable[[list[dict[str, Any]], str], None],
    warn: Callable[[str], None],
  ):
    """Prepares; nothing is traced before the second step.

    Args:
      folder: gets the trace.
      steps: how many to trace; 0 for none.
      report: called with rows and title of the table of costs.
      warn: called with what went wrong; the run goes on without a profile.
    """
    self._folder, self._steps = folder, steps
    self._report, self._warn = report, warn
    self._seen = 0
    self._tracing = False

  @contextlib.contextmanager
  def step(self) -> Iterator[None]:
    """Around one step of training."""
    self._seen += 1
    if self._steps and self._seen == 2:
      self._start()
    yield
    if self._tracing and self._seen == 1 + self._steps:
      self.close()

  def close(self) -> None:
    """Ends a trace and tells its costs; does nothing without one."""
    if not self._tracing:
      return
    import jax

    self._tracing = False
    steps = self._seen - 1
    try:
      jax.profiler.stop_trace()
      rows = costs(self._folder, steps)
    except (RuntimeError, OSError, ValueError) as error:
      self._warn(f"The profile could not be read: {error}")
      return
    self._report(rows, f"costs of {steps} steps, trace in {self._folder}")

  def _start(self) -> None:
    import jax

    if _tpu_library_without_tpu():
      self._warn(
        f"run.profile={self._steps}: no trace, since libtpu is loaded and "
        "there is no TPU: its profiler would end the process. Set "
        "JAX_PLATFORMS=cpu (or cuda) to start without it."
      )
      return
    options = jax.profiler.ProfileOptions()
    # Python's own frames would be most of the trace.
    options.python_tracer_level = 0
    try:
      jax.profiler.start_trace(str(self._folder), profiler_options=options)
    except (RuntimeError, OSError) as error:
      self._warn(f"run.profile={self._steps}: no trace ({error}).")
      return
    self._tracing = True


def _tpu_library_without_tpu() -> bool:
  """Whether libtpu is in this process and no TPU is.

  Its profiler is then registered with JAX and dereferences a device that is
  not there (libtpu 0.0.52: a segmentation fault in `start_trace`).
  """
  import jax

  if jax.default_backend() == "tpu":
    return False
  try:
    maps = pathlib.Path("/proc/self/maps").read_text(errors="replace")
  except OSError:
    return False
  return "libtpu.so" in maps


def costs(folder: pathlib.Path, steps: int) -> list[dict[str, Any]]:
  """The most expensive operations of the newest trace in a folder.

  Args:
    folder: that `Profiler` wrote to.
    steps: that were traced.

  Returns:
    Rows for a table: `TOP` of them and one for the rest.

  Raises:
    ValueError: there is no trace.
  """
  import jax

  files = sorted(folder.rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime)
  if not files:
    raise ValueError(f"{folder} holds no trace.")
  seconds: dict[tuple[str, str], float] = collections.defaultdict(float)
  for plane in jax.profiler.ProfileData.from_file(str(files[-1])).planes:
    for line in plane.lines:
      events = [
        (event.start_ns, event.duration_ns, key)
        for event in line.events
        if (key := _operation(event, line.name)) is not None
      ]
      for key, own_ns in own_times(events):
        seconds[key] += own_ns / 1e9
  return table(seconds, steps)


def _operation(event, line: str) -> tuple[str, str] | None:
  """(program, kind of operation) of an event; None if it is none."""
  stats = dict(event.stats)
  if "hlo_op" not in stats and line != _OPS_LINE:
    return None
  name = str(stats.get("hlo_op") or event.name).partition(" = ")[0]
  program = str(stats.get("hlo_module", "")).partition("(")[0]
  return program.removeprefix("jit_"), kind(name)


def kind(name: str) -> str:
  """Name of an operation without its number."""
  return re.sub(r"(\.\d+)+(\.clone)*$", "", name.lstrip("%"))


def own_times(
  events: Iterable[tuple[float, float, Any]],
) -> Iterator[tuple[Any, float]]:
  """Time of each event less that of the events inside it.

  Args:
    events: (start, duration, key) of one thread; they nest or are apart.

  Yields:
    (key, own time) of each.
  """
  stack: list[list] = []  # [end, key, own]
  for start, duration, key in sorted(events, key=lambda e: (e[0], -e[1])):
    while stack and stack[-1][0] <= start:
      _, done, own = stack.pop()
      yield done, own
    if stack:
      stack[-1][2] -= duration
    stack.append([start + duration, key, duration])
  for _, key, own in reversed(stack):
    yield key, own


def table(
  seconds: dict[tuple[str, str], float], steps: int
) -> list[dict[str, Any]]:
  """Rows of the most expensive (program, kind), and of the rest."""
  ranked = sorted(seconds.items(), key=lambda item: -item[1])
  total = sum(seconds.values())
  if len(ranked) > TOP:
    rest = sum(spent for _, spent in ranked[TOP:])
    ranked[TOP:] = [(("", f"{len(ranked) - TOP} others"), rest)]
  return [
    {
      "program": program,
      "operation": name,
      "ms a step": f"{1e3 * spent / max(1, steps):.2f}",
      "share": f"{100 * spent / max(total, 1e-12):.0f} %",
    }
    for (program, name), spent in ranked
  ]
