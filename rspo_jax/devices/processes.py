"""The processes of a run: how they find one another.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID   wherever set
    SLURM           a job step of several tasks, one a GPU (`srun`)
    TPU on GKE      TPU_WORKER_HOSTNAMES names several hosts
    TPU VM          the machine's metadata name several hosts or slices

The first that applies counts. One process needs none of it.
"""

import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

import jax

_METADATA = "computeMetadata/v1/instance/attributes"
_METADATA_TIMEOUT_S = 5.0


def initialise() -> None:
  """Joins the other processes, where there are any.

  Raises:
    ValueError: variables that make no sense, processes that do not come, or
      no device at all.
  """
  environment = os.environ
  if environment.get("JAX_PLATFORMS", "") == "cpu":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  if "JAX_COORDINATOR_ADDRESS" in environment:
    where = f"JAX_COORDINATOR_ADDRESS={environment['JAX_COORDINATOR_ADDRESS']}"
    _join(where, _from_variables(environment))
  elif cluster := find_cluster(environment):
    _join(cluster, {})
  try:
    jax.devices()
  except RuntimeError as error:
    raise ValueError(
      f"JAX finds no device ({' '.join(str(error).split())}); unset "
      "JAX_PLATFORMS or set it to what this machine has, such as cpu."
    ) from error


def find_cluster(
  environment: Mapping[str, str],
  metadata: Callable[[str], str] | None = None,
) -> str:
  """What started this process beside others that JAX can find by itself.

  Args:
    environment: variables of the process.
    metadata: attribute of the machine -> its value or ""; of the TPU VM that
      this is by default.

  Returns:
    Its name for messages; "" where the process is alone.
  """
  # SLURM_NTASKS would count the tasks of the whole job in its batch script,
  # too, which is one process.
  if environment.get("SLURM_STEP_NUM_TASKS", "1") not in ("", "1"):
    return "SLURM"
  if environment.get("JAX_PLATFORMS", "") == "cpu":
    return ""
  hosts = environment.get(
    "TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES")
  )
  if hosts is not None:
    slices = environment.get("MEGASCALE_NUM_SLICES", "1")
    return "TPU on GKE" if "," in hosts or slices not in ("", "1") else ""
  # JAX sets the one where it finds the chips of a TPU VM, the other where not.
  if (
    "TPU_ML_PLATFORM" not in environment or "TPU_SKIP_MDS_QUERY" in environment
  ):
    return ""
  ask = metadata or _metadata
  several_hosts = "," in ask("worker-network-endpoints")
  slices = environment.get("MEGASCALE_NUM_SLICES") or _slices(ask("tpu-env"))
  return "TPU VM" if several_hosts or slices not in ("", "1") else ""


def _slices(tpu_env: str) -> str:
  """Number of slices in the lines NAME: 'VALUE' of a TPU VM's metadata."""
  for line in tpu_env.splitlines():
    name, _, value = line.partition(":")
    if name.strip() == "MEGASCALE_NUM_SLICES":
      return value.strip().strip("'")
  return "1"


def _metadata(attribute: str) -> str:
  """An attribute of this machine in Google's cloud; "" where it has none."""
  host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
  request = urllib.request.Request(
    f"http://{host}/{_METADATA}/{attribute}",
    headers={"Metadata-Flavor": "Google"},
  )
  try:
    with urllib.request.urlopen(request, timeout=_METADATA_TIMEOUT_S) as answer:
      return answer.read().decode()
  except (urllib.error.URLError, TimeoutError):
    return ""


def _from_variables(environment: Mapping[str, str]) -> dict[str, object]:
  """Arguments of `jax.distributed.initialize`."""
  count = _whole_number(environment, "JAX_NUM_PROCESSES")
  index = _whole_number(environment, "JAX_PROCESS_ID")
  if not 0 <= index < count:
    raise ValueError(
      f"JAX_PROCESS_ID={index} must be below JAX_NUM_PROCESSES={count}."
    )
  return {
    "coordinator_address": environment["JAX_COORDINATOR_ADDRESS"],
    "num_processes": count,
    "process_id": index,
  }


def _whole_number(environment: Mapping[str, str], name: str) -> int:
  """A whole number from the environment."""
  text = environment.get(name, "")
  if not text.isdecimal():
    raise ValueError(
      f"{name}={text!r} must be a whole number: with JAX_COORDINATOR_ADDRESS "
      "set, each process needs JAX_NUM_PROCESSES and its own JAX_PROCESS_ID."
    )
  return int(text)


def _join(where: str, arguments: dict[str, object]) -> None:
  """Meets the other processes."""
  try:
    jax.distributed.initialize(**arguments)
  except Exception as error:  # of gRPC, of the cluster's own look-ups
    text = " ".join(str(error).split()) or type(error).__name__
    raise ValueError(
      f"{where}: the processes do not find one another ({text[:300]}); start "
      "the same command on every host, each reaching the first one's port."
    ) from error
