"""Runs, prints or continues every run of a config's `sweep()`.

    python launch/sweep.py --config=configs/countdown.py --out=DIR

1. `sweep()` of the config file gives entries: a name, overrides, seeds. Each
   entry and seed is one run of `rspo_jax.main` in `DIR/<name>-seed<seed>`.
2. All configs are resolved before anything starts: a key that does not exist,
   or a folder that holds another config, stops the sweep while it is cheap.
3. What is finished (`summary.json`) is skipped, what was begun is continued by
   the command that began it, what failed is named at the end and tried again
   by the next call. `DIR/sweep.json` says how each run stands.

A run holds a lock on its log for as long as it lives. When a sweep is killed
and its run goes on alone, the next sweep waits for that run instead of writing
into the same folder.
"""

import argparse
import collections
import contextlib
import dataclasses
import difflib
import importlib.util
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from rspo_jax import locks, mirror, run_config
from rspo_jax import main as command_line
from rspo_jax import options as options_lib

DONE, MISTAKE, FAULT, INTERRUPTED = 0, 2, 3, 75
LAUNCHERS = ("local", "slurm", "xpk")
MANIFEST = "sweep.json"
# What Python runs for a job; its arguments are those of rspo_jax.main.
TRAINER = ("-m", "rspo_jax.main")
ROOT = pathlib.Path(__file__).resolve().parent.parent

_POLL_S = 0.1
_LOG_TAIL_BYTES = 8192
_XPK_NAME_LIMIT = 40
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclasses.dataclass(frozen=True)
class Entry:
  """What `sweep()` lists: one configuration and its seeds.

  Attributes:
    name: names the folders; letters, digits and . _ = -
    overrides: value by config key, such as {"objective.lambda_": 0.0}.
    seeds: values of run.seed, one run each.
    arg: arguments of the config file, added to those of --config.
  """

  name: str
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  seeds: Sequence[int] = (0,)
  arg: str = ""


@dataclasses.dataclass(frozen=True)
class Job:
  """One run of a sweep.

  Attributes:
    name: <entry>-seed<seed>.
    entry: name of its entry.
    seed: value of run.seed.
    workdir: folder of the run.
    log: file that takes its output; locked while it runs.
    arguments: of `python -m rspo_jax.main`.
    config: the resolved config.
  """

  name: str
  entry: str
  seed: int
  workdir: pathlib.Path
  log: pathlib.Path
  arguments: tuple[str, ...]
  config: dict[str, Any]

  @property
  def command(self) -> list[str]:
    """The command line, to be run from the repository's root."""
    return [sys.executable, *TRAINER, *self.arguments]

  @property
  def finished(self) -> bool:
    """Whether the run came to the end that its config asks for."""
    try:
      return run_config.is_finished(self.workdir, self.config["run"]["steps"])
    except ValueError:
      return False  # the run says so itself

  @property
  def begun(self) -> bool:
    """Whether the run left something to continue from."""
    return (self.workdir / "config.json").exists()


def _split(config: str) -> tuple[str, str]:
  """ "FILE:ARG" -> (FILE, ARG)."""
  path, _, arg = config.partition(":")
  return path, arg


def load_entries(config: str) -> list[Entry]:
  """Reads and checks the `sweep()` of a config file.

  Args:
    config: path of the file, with or without `:ARG`.

  Raises:
    ValueError: no such file, no `sweep()`, or an entry that cannot be.
  """
  path = pathlib.Path(_split(config)[0])
  if not path.is_file():
    raise ValueError(
      f"--config={config}: {path} is not a file; try "
      "--config=configs/countdown.py from the repository's root."
    )
  spec = importlib.util.spec_from_file_location("rspo_jax_sweep_config", path)
  if spec is None or spec.loader is None:
    raise ValueError(f"--config={config}: {path} is not a Python file.")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as error:  # whatever a user's file does
    raise ValueError(
      f"--config={config} cannot be read: {type(error).__name__}: {error}"
    ) from error
  if not hasattr(module, "sweep"):
    raise ValueError(
      f"--config={config} has no sweep(); add one that returns a list of "
      '{"name": ..., "overrides": {...}, "seeds": [...]}.'
    )
  try:
    items = list(module.sweep())
  except Exception as error:
    raise ValueError(
      f"sweep() of {path} fails: {type(error).__name__}: {error}"
    ) from error
  entries = [_entry(item, str(path)) for item in items]
  if not entries:
    raise ValueError(f"sweep() of {path} is empty; list at least one entry.")
  names = collections.Counter(entry.name for entry in entries)
  twice = [name for name, count in names.items() if count > 1]
  if twice:
    raise ValueError(
      f"sweep() of {path} has {names[twice[0]]} entries named {twice[0]!r}; "
      "each needs a name of its own."
    )
  return entries


def _entry(item: Any, path: str) -> Entry:
  """Checks one item of `sweep()`."""
  if dataclasses.is_dataclass(item) and not isinstance(item, type):
    item = {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
  if not isinstance(item, Mapping):
    raise ValueError(
      f"sweep() of {path} gave {item!r}; entries are dicts with name, "
      "overrides and seeds."
    )
  allowed = [field.name for field in dataclasses.fields(Entry)]
  for key in item:
    if key not in allowed:
      near = difflib.get_close_matches(str(key), allowed, 1)
      hint = f"did you mean {near[0]!r}? " if near else ""
      raise ValueError(
        f"an entry of sweep() in {path} has the key {key!r}: {hint}allowed "
        f"are {', '.join(allowed)}."
      )
  entry = Entry(**{"name": "", **item})
  # A name becomes a folder, a job name and a file name.
  if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=-]*", str(entry.name)):
    raise ValueError(
      f"sweep() of {path} has an entry named {entry.name!r}; use letters, "
      "digits and . _ = -"
    )
  if not isinstance(entry.overrides, Mapping):
    raise ValueError(
      f"entry {entry.name!r} of {path} has overrides={entry.overrides!r}; give "
      'a dict such as {"objective.lambda_": 0.0}.'
    )
  if not isinstance(entry.seeds, Iterable):
    raise ValueError(
      f"entry {entry.name!r} of {path} has seeds={entry.seeds!r}; give a list, "
      f"such as [{entry.seeds!r}]."
    )
  seeds = list(entry.seeds)
  good = all(type(seed) is int and seed >= 0 for seed in seeds)
  if not seeds or not good or len(set(seeds)) < len(seeds):
    raise ValueError(
      f"entry {entry.name!r} of {path} has seeds={seeds!r}; give different "
      "integers >= 0."
    )
  if "run.seed" in entry.overrides:
    raise ValueError(
      f"entry {entry.name!r} of {path} overrides run.seed; use seeds=[...]."
    )
  return dataclasses.replace(entry, seeds=tuple(seeds))


def plan(
  config: str, out: pathlib.Path, extra: Sequence[str] = (), bucket: str = ""
) -> tuple[list[Job], list[str]]:
  """Resolves every run of a sweep; starts nothing and writes nothing.

  Args:
    config: the --config of the sweep.
    out: folder of the sweep.
    extra: `--config.KEY=VALUE` arguments that every run gets.
    bucket: address where the runs live, of which `out` has local copies.

  Returns:
    (jobs, notes): entries whose resolved config another entry has already are
    left out, with a note that says so.

  Raises:
    ValueError: an entry does not resolve, or a folder holds another config.
  """
  path, arg = _split(config)
  for option in extra:
    if option.startswith(("--config.run.seed", "--noconfig.run.seed")):
      raise ValueError(f"{option}: the seeds of a sweep come from its sweep().")
  jobs, notes, entry_by_config = [], [], {}
  for entry in load_entries(config):
    both = ",".join(filter(None, (arg, entry.arg)))
    options = [f"--config={path}:{both}" if both else f"--config={path}"]
    options += [f"--config.{k}={v}" for k, v in entry.overrides.items()]
    options += extra
    try:
      resolved = command_line.parse(["sweep", *options])[0].to_dict()
    except ValueError as error:
      raise ValueError(f"entry {entry.name!r}: {error}") from error
    resolved["run"]["seed"] = -1
    same = entry_by_config.setdefault(run_config.config_hash(resolved), entry)
    if same is not entry and set(entry.seeds) <= set(same.seeds):
      notes.append(
        f"{entry.name} has the config of {same.name}, whose runs serve both."
      )
      continue
    for seed in entry.seeds:
      name = f"{entry.name}-seed{seed}"
      jobs.append(
        Job(
          name=name,
          entry=entry.name,
          seed=seed,
          workdir=out / name,
          log=out / "logs" / f"{name}.log",
          arguments=(
            *options,
            f"--config.run.seed={seed}",
            f"--workdir={f'{bucket}/{name}' if bucket else out / name}",
          ),
          config=resolved | {"run": resolved["run"] | {"seed": seed}},
        )
      )
  for job in jobs:
    _check_folder(job)
  return jobs, notes


def _check_folder(job: Job) -> None:
  """Refuses a folder whose run is another one than the sweep would start."""
  if not job.begun:
    return
  path = job.workdir / "config.json"
  try:
    before = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise ValueError(
      f"{path} cannot be read ({error}); remove {job.workdir} to start that "
      "run anew, or choose another --out."
    ) from error
  if not job.config["run"]["accept_changes"]:
    run_config.check_same_run(before, job.config, str(job.workdir))


def select(jobs: Sequence[Job], text: str) -> list[Job]:
  """The jobs whose name contains a text.

  Raises:
    ValueError: none does; names what there is.
  """
  kept = [job for job in jobs if text in job.name]
  if not kept:
    names = ", ".join(dict.fromkeys(job.entry for job in jobs))
    raise ValueError(
      f"--filter={text} fits no run; entries are {names}, and runs are named "
      "<entry>-seed<seed>."
    )
  return kept


# Printing.


def commands(
  jobs: Sequence[Job], launcher: str, launcher_args: str
) -> Iterator[str]:
  """Yields shell lines that start the jobs which are not finished.

  Args:
    jobs: of a sweep.
    launcher: "local" (the plain command), "slurm" or "xpk".
    launcher_args: added to sbatch or xpk, as it stands.
  """
  yield f"# from {ROOT}"
  if launcher == "xpk":
    yield "# CLUSTER and TPU_TYPE name where to run; DIR must be storage that"
    yield "# the pods share, or every run is lost with its pod."
  for job in jobs:
    if job.finished:
      yield f"# finished: {job.name}"
    elif launcher == "local":
      yield shlex.join(job.command)
    elif launcher == "slurm":
      yield _slurm(job, launcher_args)
    else:
      yield _xpk(job, launcher_args)


def _slurm(job: Job, launcher_args: str) -> str:
  """The sbatch command of a job.

  SLURM's early SIGTERM goes to what `srun` started, so that the run saves
  before its time is up; the job is then queued again and goes on.
  """
  inner = (
    f"code=0; srun {shlex.join(_placed(job))} || code=$?; "
    f'[ "$code" -ne {INTERRUPTED} ] || scontrol requeue "$SLURM_JOB_ID"; '
    'exit "$code"'
  )
  words = [
    "sbatch",
    f"--job-name={job.name}",
    f"--chdir={ROOT}",
    f"--output={job.log.absolute()}",
    "--open-mode=append",
    "--requeue",
    "--signal=TERM@120",
  ]
  head = " ".join(filter(None, [shlex.join(words), launcher_args]))
  return f"{head} --wrap={shlex.quote(inner)}"


def _xpk(job: Job, launcher_args: str) -> str:
  """The xpk command of a job: a Kubernetes name is short and lower-case."""
  name = re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-")
  if not name[0].isalpha():
    name = "run-" + name
  if len(name) > _XPK_NAME_LIMIT:
    # The seed at the end tells runs apart: cut in front of it.
    tail = f"-{run_config.config_hash(job.config)}-seed{job.seed}"
    name = name[: _XPK_NAME_LIMIT - len(tail)].strip("-") + tail
  inner = "python3 " + shlex.join(_placed(job)[1:])
  head = [
    "xpk workload create",
    '--cluster="$CLUSTER"',
    '--tpu-type="$TPU_TYPE"',
    f"--workload={name}",
    *filter(None, [launcher_args]),
  ]
  return f"{' '.join(head)} --command={shlex.quote(inner)}"


def _placed(job: Job) -> list[str]:
  """The command with an absolute workdir: jobs start elsewhere."""
  absolute = f"--workdir={job.workdir.absolute()}"
  return [
    absolute
    if word.startswith("--workdir=") and mirror.BUCKET not in word
    else word
    for word in job.command
  ]


# Running.


class Manifest:
  """`sweep.json`: how each run of the sweep stands, rewritten at each change.

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
        (pathlib.Path(path).name, arg)
        for path, arg in map(_split, (config, str(before)))
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

  def status(self, job: Job) -> str:
    """pending | running | done | failed | interrupted."""
    return self.data["runs"][job.name]["status"]

  def write(self) -> None:
    """Replaces the file as a whole: a kill leaves the old or the new one."""
    beside = self.path.with_name(f".{MANIFEST}.{os.getpid()}")
    try:
      with open(beside, "w", encoding="utf-8") as file:
        file.write(json.dumps(self.data, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
      os.replace(beside, self.path)
    except BaseException:
      with contextlib.suppress(OSError):
        beside.unlink()
      raise


@dataclasses.dataclass
class _Child:
  """A run under way."""

  job: Job
  process: subprocess.Popen
  start_s: float
  log_start: int


class _Signals:
  """While entered, signals are counted: each asks the sweep to stop."""

  def __init__(self):
    self.asked = 0
    self._old: dict[int, Any] = {}

  def _handle(self, number, frame):
    del number, frame
    self.asked += 1

  def __enter__(self):
    for number in _SIGNALS:
      self._old[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_):
    for number, handler in self._old.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def locked(out: pathlib.Path) -> Iterator[None]:
  """Holds the sweep's folder against a second sweep.

  Raises:
    ValueError: another sweep works there.
  """
  with open(out / f".{MANIFEST}.lock", "w") as file:
    if not locks.take(file):
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
    return not locks.take(log)


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
    if not locks.take(log):
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


class _Runner:
  """The runs under way and what is said about them."""

  def __init__(self, jobs, manifest: Manifest, parallel: int, stream: TextIO):
    self.jobs = jobs
    self.manifest = manifest
    self.parallel = parallel
    self.stream = stream
    self.waiting = [job for job in jobs if not job.finished]
    self.running: list[_Child] = []
    self.held: set[str] = set()  # an earlier process of theirs lived
    self.number = {job.name: index for index, job in enumerate(jobs, 1)}

  def say(self, text: str) -> None:
    """Prints a line at once."""
    print(text, file=self.stream, flush=True)

  def about(self, job: Job, text: str) -> None:
    """Prints a line about a run."""
    total = str(len(self.jobs))
    number = str(self.number[job.name]).rjust(len(total))
    self.say(f"[{number}/{total}] {job.name}: {text}")

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


def run(
  jobs: Sequence[Job],
  manifest: Manifest,
  parallel: int = 1,
  stream: TextIO | None = None,
) -> int:
  """Runs what is not finished; returns the exit status.

  Args:
    jobs: in the order in which they start.
    manifest: takes note of every start and end.
    parallel: runs at a time.
    stream: where to say how it goes; standard output by default.

  Returns:
    0 all done, 3 some failed, 75 told to stop or a run was interrupted.
  """
  runner = _Runner(jobs, manifest, parallel, stream or sys.stdout)
  skipped = len(jobs) - len(runner.waiting)
  if skipped:
    runner.say(f"{skipped} of {len(jobs)} runs are finished.")
  manifest.write()
  passed_on = 0
  with _Signals() as signals:
    try:
      while runner.running or (runner.waiting and not signals.asked):
        if signals.asked > passed_on:
          passed_on = signals.asked
          runner.say(f"Stopping; {len(runner.running)} run(s) save first.")
          runner.terminate()
        elif not signals.asked:
          runner.fill()
        time.sleep(_POLL_S)
        runner.collect(bool(signals.asked))
    except BaseException:
      # A full disk, say: nothing goes on unwatched.
      runner.terminate()
      for child in runner.running:
        child.process.wait()
      raise
  return _conclude(jobs, manifest, bool(signals.asked), runner.say)


def _conclude(jobs, manifest: Manifest, stopped: bool, say) -> int:
  """Says how the sweep ended; returns the exit status."""
  by_status = collections.defaultdict(list)
  for job in jobs:
    by_status[manifest.status(job)].append(job)
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


# Command line.

HELP = """usage: python launch/sweep.py --config=FILE[:ARG,...] --out=DIR [options]

  --config=configs/countdown.py   config file whose sweep() lists the runs
  --out=DIR                       folder of the sweep; the same DIR goes on
  --config.GROUP.KEY=VALUE        override of one key in every run
  --filter=TEXT                   only runs whose name contains TEXT
  --jobs=N                        runs at a time (default 1)
  --dry_run                       print the commands, write nothing
  --launcher=local|slurm|xpk      slurm, xpk: print the job commands
  --launcher_args=TEXT            added to each sbatch or xpk command

exit status: 0 all done, 2 mistake in the command, 3 some runs failed (named
at the end; the same command tries them again), 75 interrupted: run the same
command to go on."""


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  """(options, overrides) of a command line, without the program's name.

  Raises:
    ValueError: one message with value and remedy.
  """
  parser = options_lib.Parser()
  parser.add_argument("--config", default="")
  parser.add_argument("--out", default="")
  parser.add_argument("--filter", default="")
  parser.add_argument("--jobs", default="1")
  parser.add_argument("--dry_run", action="store_true")
  parser.add_argument("--launcher", default="local")
  parser.add_argument("--launcher_args", default="")
  options, extra = parser.read(argv, others=r"--(no)?config\.")
  for name in ("config", "out"):
    if not getattr(options, name):
      example = {"config": "configs/countdown.py", "out": "runs/sweep"}[name]
      raise ValueError(f"--{name} is missing; try --{name}={example}.")
  if not re.fullmatch(r"[1-9]\d*", options.jobs):
    raise ValueError(f"--jobs={options.jobs} must be a whole number >= 1.")
  options.jobs = int(options.jobs)
  if options.launcher not in LAUNCHERS:
    raise ValueError(
      f"--launcher={options.launcher!r} is not known; choose from "
      f"{', '.join(LAUNCHERS)}."
    )
  if options.launcher_args and options.launcher == "local":
    raise ValueError(
      "--launcher_args goes with --launcher=slurm or --launcher=xpk."
    )
  return options, extra


def _check_out(out: pathlib.Path) -> None:
  """Refuses a folder that cannot be written, before anything is."""
  run_config.check_links(out, f"--out={out}")
  if out.exists() and not out.is_dir():
    raise ValueError(f"--out={out} is a file; name a folder.")
  parent = out.absolute()
  while not parent.exists():
    parent = parent.parent
  if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
    raise ValueError(
      f"--out={out} cannot be written: {parent} is not a writable folder; "
      "choose another."
    )


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  argv = list(sys.argv[1:] if argv is None else argv)
  if options_lib.wants_help(argv, HELP):
    return DONE
  try:
    options, extra = parse(argv)
    out = pathlib.Path(os.path.expanduser(options.out))
    bucket = ""
    if options.out.startswith(mirror.BUCKET):
      bucket = options.out.rstrip("/")
      out = mirror.local_copies(bucket)
    _check_out(out)
    every, notes = plan(options.config, out, extra, bucket)
    jobs = select(every, options.filter)
    if options.dry_run or options.launcher != "local":
      for note in notes:
        print(f"# {note}")
      for line in commands(jobs, options.launcher, options.launcher_args):
        print(line)
      if not options.dry_run:
        # sbatch does not make the folder of its output file.
        (out / "logs").mkdir(parents=True, exist_ok=True)
        Manifest(out, options.config, every).write()
      return DONE
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
      for note in notes:
        print(note)
      manifest = Manifest(out, options.config, every)
      return run(jobs, manifest, options.jobs)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return MISTAKE
  except OSError as error:
    print(
      f"error: {error}. Make room or make the folder writable, then run the "
      "same command again.",
      file=sys.stderr,
    )
    return FAULT
