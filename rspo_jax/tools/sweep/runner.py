"""Runs the jobs of a sweep on this machine, and keeps note of each.

A run holds a lock on its log for as long as it lives. When a sweep is killed
and its run goes on alone, the next sweep waits for that run instead of writing
into the same folder.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence

from rspo_jax.storage import files
from rspo_jax.tools.sweep.jobs import ROOT, Job

DONE, FAULT, INTERRUPTED = 0, 3, 75
MANIFEST = "sweep.json"

_POLL_S = 0.1
_LOG_TAIL_BYTES = 8192
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Manifest:
  """`sweep.json`: how each run of the sweep stands, rewritten at each change.

  A status is pending, running, done, failed or interrupted.

  Raises:
    ValueError: the folder holds the sweep of another config.
  """

  def __init__(self, out: pathlib.Path, config: str, jobs: Sequence[Job]):
    self.path = out / MANIFEST
    self.data = {"config": config, "runs": {}}
    if self.path.exists():
      try:
        self.data = json.loads(self.path.read_text(encoding="utf-8"))
        before, runs = self.data["config"], self.data["runs"]
      except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
          f"{self.path} cannot be read ({error}); remove it: finished and "
          "begun runs are known by their folders."
        ) from error
      # Where the file lies may differ, relative or not: the folders of the
      # runs tell whether they are the same.
      given, held = (
        os.path.basename(path) + colon + arg
        for path, colon, arg in (
          text.partition(":") for text in (config, str(before))
        )
      )
      if given != held or not isinstance(runs, dict):
        raise ValueError(
          f"--out={out} holds the sweep of --config={before}, not of "
          f"{config}; choose another --out."
        )
    for job in jobs:
      row = self.data["runs"].setdefault(
        job.name, {"attempts": 0, "status": "pending"}
      )
      row |= {
        "entry": job.entry,
        "seed": job.seed,
        "workdir": job.workdir.name,
        "arguments": list(job.arguments),
      }
      if job.finished:
        row["status"] = "done"
      elif row["status"] in ("running", "done"):
        row["status"] = "interrupted" if job.begun else "pending"

  def set(self, job: Job, **values) -> None:
    """Notes something about a run and writes the file."""
    self.data["runs"][job.name] |= values
    self.write()

  def write(self) -> None:
    """Replaces the file as a whole: a kill leaves the old or the new one."""
    files.write(self.path, json.dumps(self.data, indent=1) + "\n")


@dataclasses.dataclass
class _Child:
  """A run under way."""

  job: Job
  process: subprocess.Popen
  start_s: float
  log_start: int


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
  """Notes signals instead of ending: each asks the sweep to stop."""
  asked: list[int] = []
  before = {
    number: signal.signal(number, lambda number, _: asked.append(number))
    for number in _SIGNALS
  }
  try:
    yield asked
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def locked(out: pathlib.Path) -> Iterator[None]:
  """Holds the sweep's folder against a second sweep.

  Raises:
    ValueError: another sweep works there.
  """
  with open(out / f".{MANIFEST}.lock", "w") as file:
    if not files.lock(file):
      raise ValueError(
        f"--out={out}: another sweep works there; wait for it, or choose "
        "another --out."
      )
    yield


def _alive(job: Job) -> bool:
  """Whether a process of the run lives that this sweep did not start."""
  if not job.log.exists():
    return False
  with open(job.log, "rb") as log:
    return not files.lock(log)


def _start(job: Job) -> _Child | None:
  """Starts a run; None while an earlier process of it still lives."""
  job.log.parent.mkdir(parents=True, exist_ok=True)
  environment = dict(os.environ)
  environment["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(ROOT), environment.get("PYTHONPATH", "")])
  )
  environment["PYTHONUNBUFFERED"] = "1"
  with open(job.log, "ab") as log:
    # The child inherits this lock with its standard output and keeps it even
    # when the sweep is killed.
    if not files.lock(log):
      return None
    log.write(f"$ {shlex.join(job.command)}\n".encode())
    log.flush()
    log_start = log.tell()
    # An own session: Ctrl-C reaches the sweep alone, which passes it on once.
    process = subprocess.Popen(
      job.command,
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      env=environment,
      start_new_session=True,
    )
  return _Child(job, process, time.monotonic(), log_start)


def _last_words(child: _Child) -> str:
  """What the run said last: its error, if it named one."""
  with open(child.job.log, "rb") as log:
    size = log.seek(0, os.SEEK_END)
    log.seek(max(child.log_start, size - _LOG_TAIL_BYTES))
    text = log.read().decode("utf-8", "replace")
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  errors = [line for line in lines if line.startswith("error:")]
  return (errors or lines or ["it said nothing"])[-1]


def _verdict(child: _Child, code: int, stopping: bool) -> tuple[str, str]:
  """(status, why) of a run that ended."""
  if child.job.finished and code == DONE:
    return "done", ""
  if code == INTERRUPTED:
    return "interrupted", "it saved and stopped"
  if stopping and code in (-signal.SIGTERM, 128 + signal.SIGTERM):
    return "interrupted", "it was stopped before it could save"
  if code < 0:
    try:
      name = signal.Signals(-code).name
    except ValueError:
      name = f"signal {-code}"
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return "failed", f"killed by {name}{hint}"
  if code == DONE:
    return "failed", "exit status 0, but no summary.json"
  return "failed", f"exit status {code}: {_last_words(child)}"


def _accuracy(job: Job) -> str:
  """ "accuracy 0.41 -> 0.63" of a finished run, as far as it says."""
  try:
    summary = json.loads((job.workdir / "summary.json").read_text("utf-8"))
    before, after = (
      summary[when]["eval/accuracy"] for when in ("before", "after")
    )
    return f", accuracy {before:.3f} -> {after:.3f}"
  except (OSError, ValueError, KeyError, TypeError):
    return ""


# Prints a line at once.
say = functools.partial(print, flush=True)


class _Runner:
  """The runs under way and what is said about them."""

  def __init__(self, jobs, manifest: Manifest, parallel: int):
    self.jobs, self.manifest, self.parallel = jobs, manifest, parallel
    self.waiting = [job for job in jobs if not job.finished]
    self.running: list[_Child] = []
    self.held: set[str] = set()  # an earlier process of theirs lived
    self.number = {job.name: index for index, job in enumerate(jobs, 1)}

  def about(self, job: Job, text: str) -> None:
    """Prints a line about a run."""
    total = str(len(self.jobs))
    number = str(self.number[job.name]).rjust(len(total))
    say(f"[{number}/{total}] {job.name}: {text}")

  def fill(self) -> None:
    """Starts waiting runs where there is room.

    A run that outlived an earlier sweep takes its place among `parallel`.
    """
    alive = {job.name for job in self.waiting if _alive(job)}
    for job in self.waiting:
      if job.name in alive - self.held:
        self.about(job, "an earlier process of it still works; waiting")
    self.held |= alive
    for job in list(self.waiting):
      if job.finished:  # by that earlier process, while we waited
        self.waiting.remove(job)
        self.manifest.set(job, status="done")
        self.about(job, f"done{_accuracy(job)}")
        continue
      if len(self.running) + len(alive) >= self.parallel:
        continue
      child = None if job.name in alive else _start(job)
      if child is None:
        continue
      self.waiting.remove(job)
      self.running.append(child)
      attempts = self.manifest.data["runs"][job.name]["attempts"] + 1
      self.manifest.set(job, status="running", attempts=attempts)
      begun = "going on" if job.begun else "start"
      self.about(job, f"{begun}; log in {job.log}")

  def collect(self, stopping: bool) -> None:
    """Takes note of runs that ended."""
    for child in list(self.running):
      code = child.process.poll()
      if code is None:
        continue
      self.running.remove(child)
      seconds = time.monotonic() - child.start_s
      status, why = _verdict(child, code, stopping)
      self.manifest.set(
        child.job,
        status=status,
        exit_status=code,
        why=why,
        seconds=round(seconds, 1),
      )
      end = f", {why}" if why else _accuracy(child.job)
      self.about(child.job, f"{status} in {seconds:.0f} s{end}")

  def terminate(self) -> None:
    """Tells the runs under way to save and stop."""
    for child in self.running:
      child.process.terminate()


def run(jobs: Sequence[Job], manifest: Manifest, parallel: int) -> int:
  """Runs what is not finished; returns the exit status.

  Args:
    jobs: in the order in which they start.
    manifest: takes note of every start and end.
    parallel: runs at a time.

  Returns:
    0 all done, 3 some failed, 75 told to stop or a run was interrupted.
  """
  runner = _Runner(jobs, manifest, parallel)
  skipped = len(jobs) - len(runner.waiting)
  if skipped:
    say(f"{skipped} of {len(jobs)} runs are finished.")
  manifest.write()
  passed_on = 0
  with _signals() as asked:
    try:
      while runner.running or (runner.waiting and not asked):
        if len(asked) > passed_on:
          passed_on = len(asked)
          say(f"Stopping; {len(runner.running)} run(s) save first.")
          runner.terminate()
        elif not asked:
          runner.fill()
        time.sleep(_POLL_S)
        runner.collect(bool(asked))
    except BaseException:
      # A full disk, say: nothing goes on unwatched.
      runner.terminate()
      for child in runner.running:
        child.process.wait()
      raise
  return _conclude(jobs, manifest, bool(asked))


def _conclude(jobs, manifest: Manifest, stopped: bool) -> int:
  """Says how the sweep ended; returns the exit status."""
  by_status = collections.defaultdict(list)
  for job in jobs:
    by_status[manifest.data["runs"][job.name]["status"]].append(job)
  counts = [f"{len(found)} {name}" for name, found in sorted(by_status.items())]
  say(f"{len(jobs)} runs: {', '.join(counts)}.")
  for job in by_status["failed"]:
    why = manifest.data["runs"][job.name].get("why", "")
    say(f"  failed: {job.name}: {why} ({job.log})")
  if len(by_status["done"]) < len(jobs):
    say("The same command goes on with what is not done.")
  else:
    folder = str(manifest.path.parent)
    say(f"Next: {shlex.join(['python', 'launch/report.py', folder])}")
  if stopped:
    return INTERRUPTED
  if by_status["failed"]:
    return FAULT
  return INTERRUPTED if by_status["interrupted"] else DONE
