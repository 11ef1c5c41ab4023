"""Several processes: how they find one another, and that they are one run."""

import contextlib
import http.server
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
import tiny_runs

from rspo_jax import data, main, mirror, processes
from rspo_jax import program as program_lib
from rspo_jax.checkpoint import Checkpointer

ROOT = pathlib.Path(__file__).resolve().parent.parent
TESTS = pathlib.Path(__file__).resolve().parent

pytestmark = pytest.mark.usefixtures("quick_runs")

# A host of several: runs commands one after the other, notes what it judged.
HOST = """
import json, os, sys
import tiny_runs
from rspo_jax import main, program
judged = []
judge = program.Program.judge
def noting(self, examples, texts):
  judged.append([[self.prompt(example) for example in examples], len(texts)])
  return judge(self, examples, texts)
program.Program.judge = noting
if "LENIENT" in os.environ:
  program.Program.judge = tiny_runs.lenient(noting)
with tiny_runs.quick():
  for argv in json.loads(sys.argv[1]):
    status = main.main(argv)
    # They have met; a second meeting would be a mistake.
    os.environ.pop("JAX_COORDINATOR_ADDRESS", None)
    print("said", json.dumps([status, judged]), flush=True)
    judged.clear()
"""

# Two steps, all groups kept: scores are computed while rewards are.
SHORT = {
  "objective__skip_equal_groups": False,
  "run__steps": 2,
  "eval__every": 0,
  "cache": "",
}


def on_hosts(argvs, folder, count=2, **variables):
  """Runs commands on hosts without a common disk.

  Returns:
    For every host its [status, judged] of each command; its own disk is
    folder/<index>.
  """
  port = tiny_runs.free_port()
  hosts = []
  for index in range(count):
    disk = folder / str(index)
    disk.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": f"{ROOT}:{TESTS}",
      "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
      "JAX_NUM_PROCESSES": str(count),
      "JAX_PROCESS_ID": str(index),
    }
    hosts.append(
      subprocess.Popen(
        [sys.executable, "-c", HOST, json.dumps(argvs)],
        cwd=disk,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  said = [host.communicate(timeout=600) for host in hosts]
  for host, (_, errors) in zip(hosts, said, strict=True):
    assert host.returncode == 0, errors
  return [
    [
      json.loads(line.removeprefix("said "))
      for line in out.splitlines()
      if line.startswith("said ")
    ]
    for out, _ in said
  ], [errors for _, errors in said]


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
  """The folder of a run of one process, and its argv."""
  folder = tmp_path_factory.mktemp("alone") / "run"
  with tiny_runs.quick():
    assert main.main(tiny(folder, **SHORT)) == 0
  return folder


@pytest.fixture(scope="module")
def two_hosts(tiny, bucket, alone, tmp_path_factory):
  """A run of two hosts in a bucket; then they go on with one of one process.

  Returns:
    (folder of the hosts' disks, what each said of the two commands)
  """
  folder = tmp_path_factory.mktemp("two")
  begun = tmp_path_factory.mktemp("begun") / "run"
  shutil.copytree(alone, begun)
  (begun / "summary.json").unlink()
  shutil.rmtree(begun / "model")
  argvs = [
    tiny("gs://bucket/hosts/run", **SHORT),
    # Its checkpoint is of step 2, its last: what is left is to evaluate.
    tiny(begun, **SHORT),
  ]
  said, _ = on_hosts(argvs, folder)
  return folder, said, begun


def test_two_processes_give_the_run_of_one(two_hosts, alone):
  folder, said, _ = two_hosts
  assert [commands[0][0] for commands in said] == [0, 0]
  copies = folder / "0" / mirror.LOCAL_COPIES / "bucket" / "hosts" / "run"
  tiny_runs.assert_agrees(copies, alone, steps=2)


def test_each_process_verifies_its_own_share_and_the_first_alone_writes(
  two_hosts, bucket, tiny
):
  folder, said, _ = two_hosts
  settings = tiny_runs.program_of(tiny("unused", **SHORT)).settings
  argv = tiny("unused", **SHORT)
  program = tiny_runs.program_of(argv)
  examples = data.load_examples(program.task, "train", settings.data)
  batches = data.prompt_batches(
    examples,
    prompt=program.prompt,
    encode=program.model.tokenizer.encode,
    prompt_length=settings.prompt_length,
    pad_id=program.model.config.pad_id,
    batch_size=8,
    seed=0,
  )
  size = 4  # prompts of a host, of 8
  for step in range(2):
    whole = [program.prompt(example) for example in batches[step].examples]
    for index, commands in enumerate(said):
      # Groups of four; an evaluation judges one completion a prompt.
      groups = [prompts for prompts, n in commands[0][1] if n > len(prompts)]
      assert groups[step] == whole[size * index : size * (index + 1)]
      assert len(groups) == 2
  assert [path.name for path in (folder / "1").iterdir()] == []
  there = bucket.files("bucket/hosts/run")
  assert {"metrics.jsonl", "config.json", "summary.json"} <= there.keys()
  # Orbax: each process its own shards.
  shards = {
    name.split("/")[3] for name in there if "/state/ocdbt.process_" in name
  }
  assert shards == {"ocdbt.process_0", "ocdbt.process_1"}


def test_a_checkpoint_of_two_processes_is_one_of_one_and_the_other_way(
  two_hosts, alone, tiny
):
  _, said, begun = two_hosts
  program = tiny_runs.program_of(tiny("unused", **SHORT))
  with Checkpointer("gs://bucket/hosts/run/checkpoints") as checkpointer:
    of_two = checkpointer.restore(program.state_template)
  with Checkpointer(alone / "checkpoints") as checkpointer:
    of_one = checkpointer.restore(program.state_template)
  assert of_two.step == of_one.step == 2
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    of_two.state,
    of_one.state,
  )
  # Two went on with what one had left: its parameters, bit for bit.
  assert [commands[1][0] for commands in said] == [0, 0]
  assert (begun / "summary.json").exists()
  assert tiny_runs.files(begun / "model") == tiny_runs.files(alone / "model")
  tiny_runs.assert_agrees(begun, alone, steps=2)


# Shapes of mesh over two processes. The tests' configs have fsdp alone.

REJECTION = SHORT | {
  "objective__name": "rft",
  "objective__skip_equal_groups": True,
  "rollout__keep_groups": 4,
}
SHAPES = {
  1: {
    "data": {"data": 2, "fsdp": 1},
    "tensor": {"tensor": 2},
    "tensor when sampling": {"rollout_tensor": 2},
  },
  2: {
    "tensor within processes": {"tensor": 2},
    "tensor over processes": {"tensor": 4},
    "data, fsdp": {"data": 2},
  },
}


@pytest.fixture(scope="module")
def of_one(tiny, tmp_path_factory):
  """Folders of runs of one process: all groups kept, and some chosen."""
  folder, judge = tmp_path_factory.mktemp("one"), program_lib.Program.judge
  with pytest.MonkeyPatch.context() as patch, tiny_runs.quick():
    patch.setattr(program_lib.Program, "judge", tiny_runs.lenient(judge))
    assert main.main(tiny(folder / "all", **SHORT)) == 0
    assert main.main(tiny(folder / "some", **REJECTION)) == 0
  shares = [
    row.get("update/kept_share") for row in tiny_runs.rows(folder / "some")
  ]
  assert shares == [None, 0.5, 0.5]  # 4 groups of 8
  return folder / "all", folder / "some"


@pytest.mark.slow
@pytest.mark.parametrize("devices", sorted(SHAPES))
def test_two_processes_give_the_run_of_one_on_every_shape_of_mesh(
  tiny, of_one, tmp_path, devices
):
  alone, rejection = of_one
  runs = {}
  for shape, axes in SHAPES[devices].items():
    mesh = {f"mesh__{axis}": size for axis, size in axes.items()}
    runs[shape] = (alone, SHORT | mesh)
    if shape in ("data", "tensor"):
      runs[f"{shape}, rejection"] = (rejection, REJECTION | mesh)
  argvs = [
    tiny(tmp_path / shape, **options) for shape, (_, options) in runs.items()
  ]
  flags = f"--xla_force_host_platform_device_count={devices}"
  said, _ = on_hosts(argvs, tmp_path / "disks", XLA_FLAGS=flags, LENIENT="1")
  for index, (shape, (whole, _)) in enumerate(runs.items()):
    assert [commands[index][0] for commands in said] == [0, 0], shape
    tiny_runs.assert_agrees(tmp_path / shape, whole, steps=2)
    # Each completion is read and judged once.
    judged = sum(n for commands in said for _, n in commands[index][1])
    assert judged == 2 * 32 + 4 * 16, shape  # two evaluations, 2 kinds


@pytest.mark.slow
def test_hosts_without_a_shared_disk_are_sent_to_a_bucket(tiny, tmp_path):
  said, errors = on_hosts([tiny("run", **SHORT)], tmp_path)
  assert [commands[0][0] for commands in said] == [2, 2]
  for text in errors:
    assert "is not seen by process 1" in text and "gs://" in text
  for index in range(2):
    assert not list((tmp_path / str(index)).iterdir())


@pytest.mark.slow
def test_tasks_of_slurm_find_one_another(tmp_path):
  code = (
    "import jax\nfrom rspo_jax import processes\nprocesses.initialise()\n"
    "print(jax.process_index(), jax.process_count(), jax.device_count())"
  )
  tasks = []
  # JAX makes a port of the job's number.
  job = str(tiny_runs.free_port())
  for index in range(2):
    environment = {
      "JAX_PLATFORMS": "cpu",
      "SLURM_JOB_ID": job,
      "SLURM_STEP_NODELIST": "localhost",
      "SLURM_STEP_NUM_TASKS": "2",
      "SLURM_NTASKS": "2",
      "SLURM_PROCID": str(index),
      "SLURM_LOCALID": str(index),
    }
    tasks.append(
      subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
      )
    )
  said = [task.communicate(timeout=120)[0].split() for task in tasks]
  assert said == [["0", "2", "2"], ["1", "2", "2"]]


# What tells that there are others.

GCE = {"TPU_ML_PLATFORM": "JAX"}
GKE = GCE | {"TPU_WORKER_HOSTNAMES": "a"}
SLICES = "ACCELERATOR_TYPE: 'v5e-8'\nMEGASCALE_NUM_SLICES: '{}'\n"


@pytest.mark.parametrize(
  ("environment", "metadata", "found"),
  [
    ({}, {}, ""),
    ({"SLURM_STEP_NUM_TASKS": "8"}, {}, "SLURM"),
    ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}, {}, ""),
    # The batch script of a job with several tasks is one process.
    ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, {}, ""),
    (GKE | {"TPU_WORKER_HOSTNAMES": "a,b"}, {}, "TPU on GKE"),
    (GKE | {"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, {}, "TPU on GKE"),
    (GKE, {}, ""),
    (GKE | {"MEGASCALE_NUM_SLICES": "2"}, {}, "TPU on GKE"),
    (GKE | {"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, {}, ""),
    (GCE, {"worker-network-endpoints": "a:1:10.0.0.1,b:2:10.0.0.2"}, "TPU VM"),
    (GCE, {"worker-network-endpoints": "a:1:10.0.0.1"}, ""),
    (
      GCE,
      {"worker-network-endpoints": "a", "tpu-env": SLICES.format(2)},
      "TPU VM",
    ),
    (GCE, {"worker-network-endpoints": "a", "tpu-env": SLICES.format(1)}, ""),
    (
      GCE | {"TPU_SKIP_MDS_QUERY": "1"},
      {"worker-network-endpoints": "a,b"},
      "",
    ),
    ({}, {"worker-network-endpoints": "a,b"}, ""),
  ],
)
def test_a_process_knows_what_started_it_beside_others(
  environment, metadata, found
):
  def ask(attribute):
    return metadata.get(attribute, "")

  assert processes.find_cluster(environment, ask) == found


def test_a_tpu_vm_asks_its_machine(monkeypatch):
  class Metadata(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      assert self.headers["Metadata-Flavor"] == "Google"
      name = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
      known = name == "worker-network-endpoints"
      self.send_response(200 if known else 404)
      self.end_headers()
      self.wfile.write(b"a:1:10.0.0.1,b:2:10.0.0.2" if known else b"")

    def log_message(self, *_):
      pass

  server = http.server.HTTPServer(("127.0.0.1", 0), Metadata)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  with contextlib.closing(server.socket):
    address = f"127.0.0.1:{server.server_port}"
    monkeypatch.setenv("GCE_METADATA_IP", address)
    assert processes.find_cluster(GCE) == "TPU VM"
    server.shutdown()
  # Chips outside of Google's cloud: nobody answers, the process is alone.
  monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{tiny_runs.free_port()}")
  assert processes.find_cluster(GCE) == ""
