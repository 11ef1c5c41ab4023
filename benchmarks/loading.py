"""What loading a checkpoint costs: seconds and host memory.

    python benchmarks/loading.py [--gigabytes=2.2] [--dtype=bfloat16] [--folder=DIR]

1. Writes a checkpoint of random weights in LLaDA's layout, in several files
   (into DIR, kept; or a temporary folder, removed).
2. Reads its bytes twice: from the disk (`cold_read`; Linux is asked to forget
   them) and from memory (`read`).
3. Starts a process that imports the package, notes its memory, loads the
   checkpoint, and notes the largest memory that it had (`VmHWM`); once with
   the files in memory (`load`), once from the disk (`cold_load`).

Prints one JSON line. The bound: memory above the imported process at most
1.15 x checkpoint bytes + the largest stacked parameter.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WIDTH, HEADS, MLP, VOCABULARY = 2048, 16, 6144, 32_768

LOAD = """
import json, sys, time
import jax, numpy as np
import rspo_jax
from rspo_jax.models import checkpoints
jax.block_until_ready(jax.device_put(np.float32(0)))

def memory(key):
  for line in open("/proc/self/status"):
    if line.startswith(key):
      return int(line.split()[1]) * 1024

before = memory("VmRSS")
start = time.perf_counter()
model = rspo_jax.load_model(sys.argv[1], sys.argv[2])
seconds = time.perf_counter() - start
leaves = jax.tree.leaves(model.params)
print(json.dumps({
  "seconds": seconds,
  "before": before,
  "peak": memory("VmHWM"),
  "after": memory("VmRSS"),
  "parameters": sum(x.nbytes for x in leaves),
  "largest": max(x.nbytes for x in leaves),
}))
"""


def write(folder: pathlib.Path, size: float) -> int:
  """Writes a bfloat16 checkpoint of about `size` bytes; returns its bytes."""
  import ml_dtypes
  import numpy as np

  from rspo_jax.models import checkpoints, families, transformer

  layer = 4 * WIDTH**2 + 3 * WIDTH * MLP
  fixed = 2 * VOCABULARY * WIDTH
  config = families.ModelConfig(
    family="llada",
    vocab_size=VOCABULARY,
    width=WIDTH,
    layers=max(1, round((size / 2 - fixed) / layer)),
    heads=HEADS,
    kv_heads=HEADS,
    mlp_width=MLP,
    rope_theta=5e5,
    norm_eps=1e-5,
    mask_id=2,
    eos_id=1,
    pad_id=1,
    max_length=4096,
  )
  import jax

  shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  block = np.random.default_rng(0).standard_normal(2**20)
  block = (0.02 * block).astype(ml_dtypes.bfloat16)
  params = jax.tree.map(lambda x: np.resize(block, x.shape), shapes)
  checkpoints.SHARD_BYTES = 10**9
  checkpoints.save_model(checkpoints.Model(config, params), folder)
  return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def forget(folder: pathlib.Path) -> None:
  """Asks the system to drop the files from its cache."""
  for file in folder.glob("*.safetensors"):
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def read(folder: pathlib.Path) -> tuple[float, int]:
  """Reads all files once: (seconds, bytes)."""
  start = time.perf_counter()
  size = 0
  for file in sorted(folder.glob("*.safetensors")):
    with open(file, "rb", buffering=0) as stream:
      buffer = bytearray(2**24)
      while count := stream.readinto(buffer):
        size += count
  return time.perf_counter() - start, size


def load(folder: pathlib.Path, dtype: str) -> dict:
  """Loads the folder in a process of its own: what LOAD prints."""
  out = subprocess.run(
    [sys.executable, "-c", LOAD, str(folder), dtype],
    cwd=ROOT,
    check=True,
    capture_output=True,
    text=True,
  )
  return json.loads(out.stdout.splitlines()[-1])


def measure(folder: pathlib.Path, dtype: str) -> dict:
  """Reads and loads the folder; seconds and bytes."""
  forget(folder)
  cold_read_s, size = read(folder)
  forget(folder)
  cold_load_s = load(folder, dtype)["seconds"]
  read_s, _ = read(folder)
  found = load(folder, dtype)
  # The checkpoint's bytes as the parameters are stored: a cast to float32
  # needs twice those of bfloat16 files, whoever does it.
  allowed = 1.15 * max(size, found["parameters"]) + found["largest"]
  above = found["peak"] - found["before"]
  return {
    "checkpoint_bytes": size,
    "parameter_bytes": found["parameters"],
    "largest_parameter_bytes": found["largest"],
    "peak_above_import_bytes": above,
    "peak_over_checkpoint": round(above / size, 3),
    "allowed_bytes": int(allowed),
    "within": above <= allowed,
    "cold_read_s": round(cold_read_s, 3),
    "cold_load_s": round(cold_load_s, 3),
    "read_s": round(read_s, 3),
    "load_s": round(found["seconds"], 3),
    "load_bytes_per_s": int(size / found["seconds"]),
  }


def main() -> None:
  """Prints one JSON line."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--gigabytes", type=float, default=2.2)
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--folder", default="")
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(options.folder or temporary)
    if not list(folder.glob("*.safetensors")):
      write(folder, options.gigabytes * 1e9)
    print(json.dumps(measure(folder, options.dtype)))


if __name__ == "__main__":
  main()
