"""The folder of a run: who made it, who sees it, which config is in force."""

import contextlib
import os
import time
from collections.abc import Iterator

import jax
import numpy as np

from rspo_jax.config import identity, schema
from rspo_jax.devices import sharding
from rspo_jax.reporting import trackers
from rspo_jax.run import provenance
from rspo_jax.run.runs import Run
from rspo_jax.storage import files

ENVIRONMENT = "environment.json"
SHARED_FOLDER_S = 60.0  # until a network disk must show what was written


@contextlib.contextmanager
def held(run: Run) -> Iterator[None]:
  """Keeps other processes from training in the run's folder meanwhile.

  Raises:
    ValueError: another process has it; in every process of the run.
  """
  folder, free = None, True
  if run.main_process:
    run.workdir.mkdir(parents=True, exist_ok=True)
    folder = os.open(run.workdir, os.O_RDONLY)
    free = files.lock(folder)
  try:
    if not sharding.gather_rows(np.array([free])).all():
      raise ValueError(
        f"--workdir={run.workdir} is in use: another process trains there. "
        "Wait for it, stop it, or choose another folder."
      )
    yield
  finally:
    if folder is not None:
      os.close(folder)


def prepare(run: Run) -> None:
  """Makes the folder of a run; one that is new gets its config."""
  if run.main_process:
    brought = run.home.pull()
    run.workdir.mkdir(parents=True, exist_ok=True)
    if identity.read_config(run.workdir) is None:
      files.write_json(run.workdir / identity.CONFIG, run.config)
    if run.home.in_bucket:
      run.writer.say(
        f"Local copies in {run.workdir}; {brought} files came from the bucket."
      )
  if run.home.in_bucket:
    run.mirror()
  else:
    _check_shared(run)


def _check_shared(run: Run) -> None:
  """Refuses a folder that some of the processes do not see.

  Raises:
    ValueError: in every process.
  """
  if jax.process_count() == 1:
    return
  # The first process has written by the time that all are here.
  sharding.gather_rows(np.zeros(1))
  path = run.workdir / identity.CONFIG
  end = time.monotonic() + SHARED_FOLDER_S
  while not (seen := path.exists()) and time.monotonic() < end:
    time.sleep(0.2)  # network disks show what others wrote after a while
  blind = np.flatnonzero(~sharding.gather_rows(np.array([seen])))
  if blind.size:
    if run.main_process and len(list(run.workdir.iterdir())) == 1:
      path.unlink()
      run.workdir.rmdir()
    raise ValueError(
      f"--workdir={run.workdir} is not seen by process "
      f"{', '.join(map(str, blind))}: hosts without a shared disk need a "
      "folder in a bucket, --workdir=gs://BUCKET/FOLDER."
    )


def _open_trackers(run: Run) -> None:
  """Brings in what run.logger names."""
  wanted = trackers.names(run.settings.run.logger)
  if not wanted:
    return
  config = {
    key: value
    for key, value in identity.flat(run.config).items()
    if key not in schema.FREE_KEYS
  }
  run.writer.attach(
    trackers.Trackers(wanted, run.workdir, config, run.writer.warn)
  )


def take_config(run: Run) -> None:
  """Puts config and environment of this part of a run in its folder.

  One that the run had before, and that meant something else, is kept under
  the name of the step up to which it was in force.
  """
  if not run.main_process:
    return
  before = identity.read_config(run.workdir)
  changed = identity.changed_keys(before, run.config)
  if changed:
    run.writer.warn(
      f"From step {run.state.step} on the run has another config: "
      f"{', '.join(changed)}."
    )
    files.write_json(
      run.workdir / f"config-until-{run.state.step:06d}.json", before
    )
  if before != run.config:
    files.write_json(run.workdir / identity.CONFIG, run.config)
  files.write_json(run.workdir / ENVIRONMENT, provenance.describe())
  _open_trackers(run)
