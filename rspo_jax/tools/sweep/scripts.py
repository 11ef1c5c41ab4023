"""Shell lines that start the runs of a sweep here, under SLURM or by xpk."""

import re
import shlex
from collections.abc import Iterator, Sequence

from rspo_jax.config import identity
from rspo_jax.storage import mirror
from rspo_jax.tools.sweep.jobs import ROOT, Job

LAUNCHERS = ("local", "slurm", "xpk")
_INTERRUPTED = 75  # exit status of a run that saved and stopped
_XPK_NAME_LIMIT = 40


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
    f'[ "$code" -ne {_INTERRUPTED} ] || scontrol requeue "$SLURM_JOB_ID"; '
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
    tail = f"-{identity.config_hash(job.config)}-seed{job.seed}"
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
