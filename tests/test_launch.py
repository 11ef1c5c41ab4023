"""Launch scripts: what they would run, what they run, what they refuse."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import time

import pytest

from rspo_jax import main, plan

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
RUN = ["--", "--config=configs/countdown.py:smoke", "--workdir=gs://bucket/run"]
TPU = ["tpu.sh", "run", "--name=one", "--zone=us-west4-a", "--poll_s=0.01"]
XPK = ["xpk.sh", "--name=one", "--cluster=pods", "--type=v5litepod-16"]

# Notes its arguments, as one line; answers with the next of what is prepared
# for it: "ANSWER" or "ANSWER !STATUS"; the last one again and again.
STAND_IN = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$STAND_INS/calls"
for file in "$STAND_INS"/answers/*; do
  pattern=$(head -n 1 "$file")
  if [[ "$(basename "$0") $*" == *$pattern* ]]; then
    answer=$(sed -n 2p "$file")
    if (($(wc -l <"$file") > 2)); then sed -i 2d "$file"; fi
    code=0
    if [[ $answer == *!* ]]; then code=${answer##*!}; answer=${answer% !*}; fi
    [[ -z $answer ]] || printf '%b\\n' "$answer"
    exit "$code"
  fi
done
"""


class StandIns:
  """Programs of a cloud that note their calls and say what they are told."""

  def __init__(self, folder):
    self.folder = folder
    (folder / "bin").mkdir()
    (folder / "answers").mkdir()
    for name in ("gcloud", "xpk", "srun", "scontrol", "sleep"):
      path = folder / "bin" / name
      path.write_text(STAND_IN)
      path.chmod(0o755)

  def answer(self, pattern, *answers):
    """What a call that contains a text gives, one time after the other."""
    count = len(list((self.folder / "answers").iterdir()))
    text = "\n".join([pattern, *answers]) + "\n"
    (self.folder / "answers" / f"{count:02d}").write_text(text)

  @property
  def calls(self):
    """Calls so far, as text."""
    path = self.folder / "calls"
    return path.read_text().splitlines() if path.exists() else []

  def count(self, *texts):
    """Number of calls that contain all texts."""
    return sum(all(text in call for text in texts) for call in self.calls)

  def run(self, script, *words, **variables):
    """Runs a launch script among the stand-ins."""
    return subprocess.run(
      ["bash", str(LAUNCH / script), *words],
      cwd=self.folder,
      env={
        "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
        "HOME": str(self.folder),
        "TMPDIR": str(self.folder),
        "STAND_INS": str(self.folder),
        **variables,
      },
      capture_output=True,
      text=True,
      timeout=60,
    )


@pytest.fixture
def stand_ins(tmp_path):
  return StandIns(tmp_path)


def test_every_script_passes_shellcheck():
  shellcheck = shutil.which("shellcheck") or shutil.which(
    "shellcheck", path=pathlib.Path(os.sys.executable).parent
  )
  if shellcheck is None:
    pytest.skip("shellcheck is not installed (requirements-dev.txt)")
  done = subprocess.run(
    [shellcheck, "-x", *map(str, SCRIPTS)],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout


# Dry runs.


@pytest.mark.parametrize(
  ("words", "printed"),
  [
    (
      [*TPU, "--spot"],
      [
        "tpu-vm create one --zone=us-west4-a --accelerator-type=v5litepod-4 "
        "--spot --version=v2-alpha-tpuv5-lite",
        "tpu-vm scp",
        "bash launch/setup_tpu_vm.sh",
        "--worker=all",
        "bash launch/worker.sh start --config=configs/countdown.py:smoke "
        "--workdir=gs://bucket/run",
        "bash launch/worker.sh status",
        "rsync --recursive",
        "gs://bucket/run runs/run",
      ],
    ),
    (
      [*TPU, "--queued", "--type=v6e-8", "--project=mine", "--out=here"],
      [
        "queued-resources create one --node-id=one --zone=us-west4-a "
        "--project=mine --accelerator-type=v6e-8 "
        "--runtime-version=v2-alpha-tpuv6e",
        "gs://bucket/run here",
      ],
    ),
    (["tpu.sh", "delete", *TPU[2:]], ["tpu-vm delete one", "--quiet"]),
    (["tpu.sh", "stop", *TPU[2:]], ["bash launch/worker.sh stop"]),
    (["tpu.sh", "fetch", *TPU[2:]], ["gs://bucket/run runs/run"]),
    (
      [*XPK, "--slices=2", "--spot"],
      [
        "xpk workload create --workload=one --cluster=pods",
        "--tpu-type=v5litepod-16 --num-slices=2 --spot",
        "--restart-on-exit-codes=75",
        "bash launch/setup_tpu_vm.sh && exec .venv/bin/python -u -m "
        "rspo_jax.main --config=configs/countdown.py:smoke",
      ],
    ),
    ([*XPK, "--fetch"], ["gs://bucket/run runs/run"]),
  ],
)
def test_a_dry_run_prints_what_would_run_and_runs_nothing(
  words, printed, stand_ins
):
  script, *options = words
  done = stand_ins.run(script, *options, "--dry_run", *RUN)
  assert done.returncode == 0, done.stderr
  for text in printed:
    assert text in done.stdout, text
  assert stand_ins.calls == []
  assert not (stand_ins.folder / "runs").exists()
  for line in done.stdout.splitlines():
    assert shlex.split(line, comments=True) or line.startswith("#")


def test_a_dry_run_prints_each_argument_as_one_word(stand_ins):
  odd = "--config.data.source=a b'c$(d).jsonl"
  done = stand_ins.run(*TPU, "--dry_run", *RUN, odd)
  starts = [
    shlex.split(line)
    for line in done.stdout.splitlines()
    if "worker.sh start" in line
  ]
  (command,) = [w for w in starts[0] if w.startswith("--command=")]
  assert shlex.split(command)[-1] == odd


def test_setup_says_what_it_would_install(stand_ins):
  done = stand_ins.run("setup_tpu_vm.sh", "--dry_run")
  assert done.returncode == 0
  assert "jax[tpu]" in done.stdout and "-r requirements-gcs.txt" in done.stdout


# Runs.


def test_a_run_is_started_again_while_it_ends_with_75(stand_ins):
  stand_ins.answer("tpu-vm describe", " !1", "CREATING", "READY")
  stand_ins.answer(
    "worker.sh status",
    "rspo_jax: running",
    "rspo_jax: 75",
    "rspo_jax: running",
    "rspo_jax: 0",
  )
  done = stand_ins.run(*TPU, *RUN)
  assert done.returncode == 0, done.stderr
  assert stand_ins.count("tpu-vm create one") == 1
  assert stand_ins.count("worker.sh start") == 2
  # The machines were the same: nothing had to be brought again.
  assert stand_ins.count("setup_tpu_vm.sh") == stand_ins.count("scp") == 1
  assert "storage rsync" in stand_ins.calls[-1]
  assert "launch/tpu.sh delete --name=one" in done.stderr


def test_machines_that_are_taken_away_are_replaced(stand_ins):
  stand_ins.answer(
    "tpu-vm describe", "READY", "PREEMPTED", "PREEMPTED", " !1", "READY"
  )
  stand_ins.answer(
    "worker.sh status", "rspo_jax: running", " !255", "rspo_jax: 0"
  )
  done = stand_ins.run(*TPU, *RUN)
  assert done.returncode == 0, done.stderr
  calls = "\n".join(stand_ins.calls)
  assert stand_ins.count("tpu-vm delete one") == 1
  assert stand_ins.count("tpu-vm create one") == 1
  assert calls.index("delete one") < calls.index("create one")
  assert stand_ins.count("worker.sh start") == 2
  assert stand_ins.count("setup_tpu_vm.sh") == 2


def test_a_place_in_the_queue_is_waited_for_and_asked_for_again(stand_ins):
  stand_ins.answer(
    "queued-resources describe",
    " !1",
    "WAITING_FOR_RESOURCES",
    "PROVISIONING",
    "SUSPENDED",
    " !1",
    "ACTIVE",
  )
  stand_ins.answer("tpu-vm describe", "READY")
  stand_ins.answer("worker.sh status", "rspo_jax: 0")
  done = stand_ins.run(*TPU, "--queued", *RUN)
  assert done.returncode == 0, done.stderr
  assert stand_ins.count("queued-resources create one") == 2
  assert stand_ins.count("queued-resources delete one", "--force") == 1
  assert stand_ins.count("worker.sh start") == 1
  # What gives it back knows of the queue, too.
  (line,) = [x for x in done.stderr.splitlines() if "give it back" in x]
  words = line.partition("launch/tpu.sh ")[2].split()
  assert words == ["delete", *TPU[2:4], "--queued"]


@pytest.mark.parametrize(
  ("hosts", "status", "starts"),
  [
    # One host's fault is the run's; the others only waited for it.
    (["3", "75", "running"], None, 1),
    (["3", "75", "75"], 3, 1),
    (["2"], 2, 1),
    (["0", "75"], 0, 2),
    (["lost", "0"], 0, 2),
    (["lost", "137"], 137, 1),
  ],
)
def test_the_worst_of_the_hosts_decides(hosts, status, starts, stand_ins):
  stand_ins.answer("tpu-vm describe", "READY")
  said = "\\n".join(f"rspo_jax: {host}" for host in hosts)
  # After a first end that is gone on from, the second is a success.
  stand_ins.answer("worker.sh status", said, "rspo_jax: 0")
  stand_ins.answer("worker.sh log", "what it said last")
  done = stand_ins.run(*TPU, *RUN)
  assert done.returncode == (status or 0), done.stderr
  assert stand_ins.count("worker.sh start") == starts
  assert stand_ins.count("storage rsync") == 1
  if status:
    assert "what it said last" in done.stdout
    assert f"exit status {status}" in done.stderr


def test_restarts_have_an_end(stand_ins):
  stand_ins.answer("tpu-vm describe", "READY")
  stand_ins.answer("worker.sh status", "rspo_jax: 75")
  done = stand_ins.run(*TPU, "--restarts=2", *RUN)
  assert done.returncode == 75
  assert stand_ins.count("worker.sh start") == 3


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["tpu.sh", "fly"], "use run, fetch, stop or delete"),
    (["tpu.sh", "run", "--zone=a"], "--name="),
    (["tpu.sh", "run", "--name=One", "--zone=a"], "--name=One"),
    (["tpu.sh", "run", "--name=one"], "--zone is missing"),
    ([*TPU, "--zones=a"], "--zones"),
    ([*TPU, "--type"], "--type"),
    ([*TPU, "--restarts=many"], "--restarts=many"),
    ([*TPU, "--config=configs/countdown.py"], "behind --"),
    ([*TPU, "--", "--workdir=gs://bucket/run"], "no --config"),
    ([*TPU, "--", "--config=x", "--workdir=runs/one"], "gs://"),
    ([*TPU, "--", "--config=x"], "gs://"),
    ([*XPK, "--", "--config=x", "--workdir=runs/one"], "gs://"),
    ([*XPK[:2], *XPK[3:], *RUN], "--cluster is missing"),
    ([*XPK[:-1], *RUN], "--type is missing"),
    ([*XPK, "--slices=0", *RUN], "--slices=0"),
    (["slurm.sbatch"], "no --config"),
    (["slurm.sbatch", "--config=x"], "no --workdir"),
    (["setup_tpu_vm.sh", "--dryrun"], "--dryrun"),
    (["worker.sh"], "launch/worker.sh start"),
  ],
)
def test_what_cannot_be_is_refused_before_anything_runs(words, said, stand_ins):
  done = stand_ins.run(*words)
  assert done.returncode == 2
  assert said in done.stderr
  assert stand_ins.calls == []


@pytest.mark.parametrize("script", ["tpu.sh", "xpk.sh", "setup_tpu_vm.sh"])
def test_help_lists_every_option(script, stand_ins):
  done = stand_ins.run(script, "--help")
  assert done.returncode == 0 and "--dry_run" in done.stdout
  text = (LAUNCH / script).read_text()
  declared = re.search(r'parse_options "(.*?)" \\?\n? *"(.*?)"', text)
  for name in " ".join(declared.groups()).split():
    assert f"--{name}" in done.stdout, name


# On a host.

# Stands in for Python: saves when it is told to, fails when it is told to.
TRAINER = """#!/usr/bin/env bash
echo "arguments: $*"
[[ "$*" == *fail* ]] && exit 3
trap 'echo saving; exit 75' TERM
for ((i = 0; i < 600; i++)); do read -rt 0.1 <> <(:) || true; done
"""


def test_a_host_keeps_its_run_and_says_how_it_stands(tmp_path):
  trainer = tmp_path / "trainer"
  trainer.write_text(TRAINER)
  trainer.chmod(0o755)
  job = tmp_path / "job"

  def worker(*words):
    return subprocess.run(
      ["bash", str(LAUNCH / "worker.sh"), *words],
      env=os.environ | {"RSPO_JAX_JOB": str(job), "PYTHON": str(trainer)},
      capture_output=True,
      text=True,
      timeout=30,
      check=True,
    ).stdout.strip()

  def ends_with(status):
    end = time.monotonic() + 20
    while (said := worker("status")) == "rspo_jax: running":
      assert time.monotonic() < end
      time.sleep(0.05)
    return said == f"rspo_jax: {status}"

  assert worker("start", "--config=a b") == "rspo_jax: started"
  try:
    assert worker("status") == "rspo_jax: running"
    assert worker("start", "--config=a b") == "rspo_jax: running already"
    with pytest.raises(subprocess.CalledProcessError) as other:
      worker("start", "--config=other")
    assert other.value.returncode == 2
    assert "another run is at work here: --config=a\\ b" in other.value.stderr
  finally:
    worker("stop")
  assert ends_with(75)
  assert worker("log").splitlines() == [
    "arguments: -u -m rspo_jax.main --config=a b",
    "saving",
  ]
  worker("start", "--fail")
  assert ends_with(3)
  # A machine that was started anew knows a process number and no end.
  (job / "status").unlink()
  assert worker("status") == "rspo_jax: lost"


@pytest.mark.parametrize(("code", "requeued"), [(0, 0), (75, 1), (3, 0)])
def test_slurm_queues_a_job_again_that_was_told_to_stop(
  code, requeued, stand_ins
):
  stand_ins.answer("srun", f"it ran !{code}")
  done = stand_ins.run(
    "slurm.sbatch", *RUN[1:], SLURM_JOB_ID="17", SLURM_SUBMIT_DIR=str(ROOT)
  )
  assert done.returncode == code, done.stderr
  assert stand_ins.count("srun", "-m rspo_jax.main", *RUN[1:]) == 1
  assert stand_ins.count("scontrol requeue 17") == requeued


def test_slurm_tells_the_tasks_and_not_the_script():
  text = (LAUNCH / "slurm.sbatch").read_text()
  options = dict(
    line.removeprefix("#SBATCH --").partition("=")[::2]
    for line in text.splitlines()
    if line.startswith("#SBATCH")
  )
  assert options["signal"].startswith("TERM@")
  assert "requeue" in options and options["open-mode"] == "append"
  # One process a GPU, all of them visible to each (see the file).
  assert options["ntasks-per-node"] == options["gpus-per-node"]


# The guide.


def commands_of(page):
  """Shell commands in the bash blocks of a page, as words."""
  blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
  for block in blocks:
    for line in block.replace("\\\n", " ").splitlines():
      yield shlex.split(line.removesuffix("&"))


def test_every_command_of_the_guide_is_one_that_works(stand_ins, monkeypatch):
  monkeypatch.chdir(ROOT)
  checked = set()
  for words in commands_of(ROOT / "docs" / "tpu.md"):
    while words and re.match(r"[A-Z_]+=", words[0]):
      words = words[1:]
    if words[:1] == ["sbatch"]:
      place = words.index("launch/slurm.sbatch")
      assert all(word.startswith("--") for word in words[1:place])
      words = words[place:]
    program, *arguments = words
    if program.startswith("launch/"):
      script = program.removeprefix("launch/")
      if script == "slurm.sbatch":
        arguments = ["--dry_run", *arguments]
      else:
        place = arguments.index("--") if "--" in arguments else len(arguments)
        arguments.insert(place, "--dry_run")
      done = stand_ins.run(script, *arguments)
      assert done.returncode == 0, (words, done.stderr)
      # What is to run there is parsed like a command here.
      if "--" in arguments or script == "slurm.sbatch":
        main.parse(["x", *[a for a in arguments if a.startswith("--con")]])
      checked.add(script)
    elif arguments[:2] == ["-m", "rspo_jax.main"]:
      main.parse(["x", *arguments[2:]])
      checked.add("main")
    elif arguments[:1] == ["launch/plan.py"]:
      plan.parse(arguments[1:])
      checked.add("plan")
    else:
      assert program in ("gcloud", "hf", "export", ".venv/bin/python"), words
  assert checked == {"tpu.sh", "xpk.sh", "slurm.sbatch", "main", "plan"}
