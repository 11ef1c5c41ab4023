"""What a run was computed with: versions, devices, cores, commit.

Goes into the run's `environment.json`, so that a figure can be traced to the
code and the machine that made it. Names of users, hosts and folders stay out.
"""

import os
import pathlib
import platform
import subprocess
from importlib import metadata
from typing import Any

import jax

import rspo_jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_GIT_LIMIT_S = 5.0


def describe() -> dict[str, Any]:
  """Versions, devices and cores of this process, and the code's commit."""
  devices = jax.devices()
  return {
    "rspo_jax": rspo_jax.__version__,
    "commit": commit(),
    "python": platform.python_version(),
    "versions": {name: _version(name) for name in _PACKAGES},
    "system": f"{platform.system()} {platform.machine()}",
    "platform": devices[0].platform,
    "device": devices[0].device_kind,
    "devices": len(devices),
    "processes": jax.process_count(),
    "cores": len(os.sched_getaffinity(0))
    if hasattr(os, "sched_getaffinity")
    else os.cpu_count(),
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
  }


def commit() -> str:
  """Commit of the clone that the code runs from; "" outside of one."""
  root = pathlib.Path(__file__).resolve().parents[2]
  if not (root / ".git").exists():
    return ""
  try:
    done = subprocess.run(
      ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=9"],
      capture_output=True,
      text=True,
      timeout=_GIT_LIMIT_S,
    )
  except (OSError, subprocess.TimeoutExpired):
    return ""
  return done.stdout.strip() if done.returncode == 0 else ""


def _version(name: str) -> str:
  """Installed version of a package, "" where there is none."""
  try:
    return metadata.version(name)
  except metadata.PackageNotFoundError:
    return ""
