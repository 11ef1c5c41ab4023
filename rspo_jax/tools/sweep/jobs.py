"""The runs of a sweep: each with its folder, its command and its config."""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rspo_jax.config import identity, load
from rspo_jax.tools.sweep import entries as entries_lib

# What Python runs for a job; its arguments are those of rspo_jax.main.
TRAINER = ("-m", "rspo_jax.main")
ROOT = pathlib.Path(__file__).resolve().parents[3]


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
      return identity.is_finished(self.workdir, self.config["run"]["steps"])
    except ValueError:
      return False  # the run says so itself

  @property
  def begun(self) -> bool:
    """Whether the run left something to continue from."""
    return (self.workdir / identity.CONFIG).exists()


def plan(
  config: str,
  out: pathlib.Path,
  overrides: Mapping[str, str] | None = None,
  bucket: str = "",
) -> tuple[list[Job], list[str]]:
  """Resolves every run of a sweep; starts nothing and writes nothing.

  Args:
    config: the --config of the sweep.
    out: folder of the sweep.
    overrides: text by key, which every run gets.
    bucket: address where the runs live, of which `out` has local copies.

  Returns:
    (jobs, notes): entries whose resolved config another entry has already are
    left out, with a note that says so.

  Raises:
    ValueError: an entry does not resolve, or a folder holds another config.
  """
  path, _, arg = config.partition(":")
  overrides = overrides or {}
  if "run.seed" in overrides:
    raise ValueError(
      f"--config.run.seed={overrides['run.seed']}: the seeds of a sweep come "
      "from its sweep()."
    )
  jobs, notes, entry_by_config = [], [], {}
  for entry in entries_lib.load_entries(config):
    args = ",".join(filter(None, (arg, entry.arg)))
    file = f"{path}:{args}" if args else path
    values = {k: str(v) for k, v in entry.overrides.items()} | overrides
    try:
      resolved = load.resolve(file, values).to_dict()
    except ValueError as error:
      raise ValueError(f"entry {entry.name!r}: {error}") from error
    resolved["run"]["seed"] = -1
    same = entry_by_config.setdefault(identity.config_hash(resolved), entry)
    if same is not entry and set(entry.seeds) <= set(same.seeds):
      notes.append(
        f"{entry.name} has the config of {same.name}, whose runs serve both."
      )
      continue
    options = [f"--config={file}"]
    options += [f"--config.{key}={text}" for key, text in values.items()]
    for seed in entry.seeds:
      name = f"{entry.name}-seed{seed}"
      place = f"{bucket}/{name}" if bucket else out / name
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
            f"--workdir={place}",
          ),
          config=resolved | {"run": resolved["run"] | {"seed": seed}},
        )
      )
  for job in jobs:
    before = identity.read_config(job.workdir)
    if before is not None and not job.config["run"]["accept_changes"]:
      identity.check_same_run(before, job.config, str(job.workdir))
  return jobs, notes


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
