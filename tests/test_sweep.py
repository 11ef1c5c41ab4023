"""Sweeps: nothing is lost, nothing runs twice, and what failed is named.

The runs are a small program in the place of rspo_jax.main, which keeps its
folder and its exit status as a run does.
"""

import contextlib
import io
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from rspo_jax import main as command_line
from rspo_jax import run_config, sweep

ROOT = pathlib.Path(__file__).resolve().parent.parent

CONFIG = """
from configs import base

def get_config(arg=""):
  config = base.get_config()
  config.run.steps = 3
  return base.apply(
    config, arg, {"long": lambda c: c.run.update({"steps": 400})}
  )

def sweep():
  return [
    {"name": "plain", "seeds": [0, 1]},
    {"name": "zero", "overrides": {"objective.lambda_": 0.0}, "seeds": [0, 1]},
  ]
"""

# Writes a line of steps.txt a step, and an END line a process, so that a test
# sees whether work was repeated or two processes wrote at once.
TRAINER = """
import json, os, pathlib, signal, sys, time
sys.path.insert(0, os.environ["REPOSITORY"])
from rspo_jax import main
config, _, workdir, _ = main.parse(sys.argv)
folder = pathlib.Path(workdir)
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
steps = folder / "steps.txt"
begin = len(steps.read_text().split()) if steps.exists() else 0
if (folder / "summary.json").exists() and begin >= config.run.steps:
  print("This run is finished")
  sys.exit(0)
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.json").write_text(json.dumps(config.to_dict()))
for step in range(begin, config.run.steps):
  if asked:
    sys.exit(75)
  if config.objective.lambda_ == 0 and config.run.seed == 1 and step == 1:
    if not os.path.exists(os.environ["CURE"]):
      print("error: the loss is not finite")
      sys.exit(3)
  with steps.open("a") as file:
    file.write(f"{step}\\n")
  time.sleep(0.02)
(folder / "summary.json").write_text(json.dumps(
  {
    "before": {"eval/accuracy": 0.25},
    "after": {"eval/accuracy": 0.5},
    "steps": config.run.steps,
  }
))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
  """Folder with config.py and the stand-in for the trainer, in use."""
  (tmp_path / "config.py").write_text(CONFIG)
  (tmp_path / "trainer.py").write_text(TRAINER)
  monkeypatch.setattr(sweep, "TRAINER", (str(tmp_path / "trainer.py"),))
  monkeypatch.setenv("REPOSITORY", str(ROOT))
  monkeypatch.setenv("CURE", str(tmp_path / "cure"))
  # The config file does as the real ones: `from configs import base`.
  monkeypatch.syspath_prepend(str(ROOT))
  return tmp_path


def call(*words):
  """(exit status, standard output, standard error) of a sweep."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = sweep.main([str(word) for word in words])
  return code, out.getvalue(), err.getvalue()


def in_background(place, *words):
  """A sweep in a process of its own, which can be killed."""
  driver = place / "driver.py"
  driver.write_text(
    textwrap.dedent(f"""
      import sys
      sys.path.insert(0, {str(ROOT)!r})
      from rspo_jax import sweep
      sweep.TRAINER = ({str(place / "trainer.py")!r},)
      sys.exit(sweep.main())
    """)
  )
  return subprocess.Popen(
    [sys.executable, str(driver), *(str(word) for word in words)],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def wait_for(condition, limit_s=30.0):
  end = time.monotonic() + limit_s
  while not condition():
    assert time.monotonic() < end, "it did not happen in time"
    time.sleep(0.02)


def steps_of(folder):
  path = folder / "steps.txt"
  return [int(word) for word in path.read_text().split()]


def manifest(out):
  return json.loads((out / "sweep.json").read_text())


def statuses(out):
  return {name: row["status"] for name, row in manifest(out)["runs"].items()}


def test_every_entry_and_seed_runs_in_its_folder_with_its_overrides(place):
  (place / "cure").touch()
  out = place / "out"
  code, said, _ = call(f"--config={place}/config.py", f"--out={out}")
  assert code == 0, said
  folders = {path.parent.name for path in out.glob("*/summary.json")}
  assert folders == {"plain-seed0", "plain-seed1", "zero-seed0", "zero-seed1"}
  config = json.loads((out / "zero-seed1" / "config.json").read_text())
  assert config["objective"]["lambda_"] == 0
  assert config["run"]["seed"] == 1
  assert set(statuses(out).values()) == {"done"}
  assert "accuracy 0.250 -> 0.500" in said


def test_what_comes_next_is_printed_as_a_shell_reads_it(place):
  (place / "cure").touch()
  out = place / "my sweep"
  code, said, _ = call(
    f"--config={place}/config.py", f"--out={out}", "--filter=plain-seed0"
  )
  assert code == 0, said
  (line,) = [x for x in said.splitlines() if x.startswith("Next: ")]
  assert shlex.split(line)[1:] == ["python", "launch/report.py", str(out)]


def test_a_link_that_leads_nowhere_is_refused_as_a_folder(place):
  link = place / "link"
  link.symlink_to(place / "gone")
  code, _, err = call(f"--config={place}/config.py", f"--out={link}")
  assert code == 2
  assert f"{link} is a symbolic link" in err and "remove the link" in err


def test_goes_on_after_a_failure_names_it_and_tries_it_again(place):
  out = place / "out"
  command = (f"--config={place}/config.py", f"--out={out}")
  code, said, _ = call(*command, "--jobs=2")
  assert code == 3
  assert statuses(out) == {
    "plain-seed0": "done",
    "plain-seed1": "done",
    "zero-seed0": "done",
    "zero-seed1": "failed",
  }
  assert "failed: zero-seed1: exit status 3: error: the loss is not" in said
  (place / "cure").touch()
  code, said, _ = call(*command)
  assert code == 0
  assert "3 of 4 runs are finished" in said
  assert steps_of(out / "zero-seed1") == [0, 1, 2]
  assert manifest(out)["runs"]["zero-seed1"]["attempts"] == 2
  assert manifest(out)["runs"]["plain-seed0"]["attempts"] == 1


def test_twelve_runs_survive_a_failing_run_and_a_kill(place):
  config = place / "config.py"
  config.write_text(
    CONFIG.replace("[0, 1]", "range(6)").replace("steps = 3", "steps = 12")
  )
  out = place / "out"
  command = (f"--config={config}", f"--out={out}", "--jobs=2")
  process = in_background(place, *command)
  wait_for(lambda: len(list(out.glob("*/summary.json"))) >= 3)
  wait_for(lambda: len(list(out.glob("*/config.json"))) >= 4)
  process.kill()
  process.wait()
  code, said, _ = call(*command)
  assert code == 3, said
  found = statuses(out)
  assert len(found) == 12
  assert [n for n, s in found.items() if s != "done"] == ["zero-seed1"]
  for name in found:
    if name != "zero-seed1":
      assert steps_of(out / name) == list(range(12)), name


def test_waits_for_a_run_that_outlived_a_killed_sweep(place):
  out = place / "out"
  command = (
    f"--config={place}/config.py:long",
    f"--out={out}",
    "--config.run.steps=100",
  )
  process = in_background(place, *command, "--filter=plain-seed0")
  wait_for(lambda: (out / "plain-seed0" / "steps.txt").exists())
  process.kill()
  process.wait()
  assert not (out / "plain-seed0" / "summary.json").exists()
  code, said, _ = call(*command, "--filter=plain")
  assert code == 0
  assert "an earlier process of it still works; waiting" in said
  # It counts among the one run at a time: the other starts when it is done.
  assert said.index("plain-seed0: done") < said.index("plain-seed1: start")
  assert steps_of(out / "plain-seed0") == list(range(100))
  assert manifest(out)["runs"]["plain-seed0"]["attempts"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_runs_save_and_the_same_command_goes_on(
  place, number
):
  out = place / "out"
  command = (
    f"--config={place}/config.py",
    f"--out={out}",
    "--filter=plain",
    "--config.run.steps=60",
  )
  process = in_background(place, *command)
  wait_for(lambda: (out / "plain-seed0" / "steps.txt").exists())
  process.send_signal(number)
  said, _ = process.communicate(timeout=30)
  assert process.returncode == 75, said
  assert "1 interrupted, 1 pending" in said
  begun = len(steps_of(out / "plain-seed0"))
  assert 0 < begun < 60
  code, said, _ = call(*command)
  assert code == 0
  assert "plain-seed0: going on" in said
  assert steps_of(out / "plain-seed0") == list(range(60))


def test_two_sweeps_do_not_work_in_one_folder(place):
  out = place / "out"
  out.mkdir()
  with sweep.locked(out):
    code, _, err = call(f"--config={place}/config.py", f"--out={out}")
  assert code == 2
  assert "another sweep works there" in err


def test_a_run_killed_from_outside_is_failed_with_the_signal(place):
  out = place / "out"
  process = in_background(
    place, f"--config={place}/config.py:long", f"--out={out}", "--filter=seed0"
  )
  wait_for(lambda: (out / "plain-seed0" / "steps.txt").exists())
  listed = subprocess.run(
    ["ps", "-o", "pid=", "--ppid", str(process.pid)],
    capture_output=True,
    text=True,
  )
  os.kill(int(listed.stdout.split()[0]), signal.SIGKILL)
  wait_for(lambda: (out / "zero-seed0" / "steps.txt").exists())
  process.terminate()
  said, _ = process.communicate(timeout=30)
  assert "failed: plain-seed0: killed by SIGKILL (out of memory?)" in said


def test_dry_run_prints_commands_that_resolve_and_writes_nothing(place):
  out = place / "out"
  code, said, _ = call(
    f"--config={place}/config.py:long",
    f"--out={out}",
    "--dry_run",
    "--config.data.source=a b; rm -r",
  )
  assert code == 0
  assert not out.exists()
  lines = [line for line in said.splitlines() if not line.startswith("#")]
  assert len(lines) == 4
  words = shlex.split(lines[3])
  config, _, workdir, mode = command_line.parse(words[1:])
  assert workdir == str(out / "zero-seed1")
  assert mode == "train"
  assert config.objective.lambda_ == 0
  assert config.run.seed == 1
  assert config.run.steps == 400
  assert config.data.source == "a b; rm -r"


def test_slurm_jobs_save_before_their_time_is_up(place):
  code, said, _ = call(
    f"--config={place}/config.py",
    f"--out={place}/out",
    "--launcher=slurm",
    "--launcher_args=--gres=gpu:1",
    "--filter=zero-seed0",
  )
  assert code == 0
  (line,) = [line for line in said.splitlines() if line.startswith("sbatch")]
  words = shlex.split(line)
  assert "--job-name=zero-seed0" in words
  assert "--signal=TERM@120" in words
  assert "--gres=gpu:1" in words
  inner = next(w for w in words if w.startswith("--wrap=")).split("=", 1)[1]
  assert f"--workdir={place}/out/zero-seed0 " in inner
  assert (place / "out" / "logs").is_dir()
  # SLURM signals what srun started; a run that saved is queued again.
  for code in (0, 3, 75):
    for name, text in (
      ("srun", f"exit {code}"),
      ("scontrol", f'echo "$@" >>{place}/requeued'),
    ):
      tool = place / "bin" / name
      tool.parent.mkdir(exist_ok=True)
      tool.write_text(f"#!/bin/sh\n{text}\n")
      tool.chmod(0o755)
    path = f"{place}/bin:{os.environ['PATH']}"
    done = subprocess.run(
      ["sh", "-c", inner], env={"PATH": path, "SLURM_JOB_ID": f"job{code}"}
    )
    assert done.returncode == code
  assert (place / "requeued").read_text() == "requeue job75\n"


def test_xpk_workload_names_are_valid_and_different(tmp_path):
  entry = "A_very_long_name.of_an_entry_that_Kubernetes=refuses"
  names = set()
  for seed in (1, 2, 13):
    job = sweep.Job(
      name=f"{entry}-seed{seed}",
      entry=entry,
      seed=seed,
      workdir=tmp_path / "w",
      log=tmp_path / "l",
      arguments=("--config=c.py",),
      config={"run": {"seed": seed, "steps": 1}},
    )
    line = next(
      line
      for line in sweep.commands([job], "xpk", "")
      if line.startswith("xpk workload create")
    )
    words = shlex.split(line)
    (name,) = [w.split("=")[1] for w in words if w.startswith("--workload=")]
    assert len(name) <= 40
    assert name[0].isalpha()
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    names.add(name)
  assert len(names) == 3


@pytest.mark.parametrize("task", ["countdown", "sudoku"])
def test_the_ablation_of_a_task_resolves(task, monkeypatch):
  monkeypatch.chdir(ROOT)
  monkeypatch.syspath_prepend(str(ROOT))
  jobs, _ = sweep.plan(f"configs/{task}.py", pathlib.Path("runs/none"))
  entries = {job.entry: job.config for job in jobs}
  base = run_config.flat(entries["rspo"])
  base.pop("run.seed")
  assert entries["lambda_0"]["objective"]["lambda_"] == 0
  lambdas = {config["objective"]["lambda_"] for config in entries.values()}
  assert max(lambdas) / min(lambdas - {0}) >= 1e4
  for name, config in entries.items():
    other = run_config.flat(config)
    changed = {key for key, value in base.items() if other[key] != value}
    assert changed or name == "rspo", f"{name} changes nothing"
  assert len({job.seed for job in jobs}) >= 3


def test_the_same_config_under_two_names_runs_once(place):
  (place / "config.py").write_text(
    CONFIG.replace("0.0", "0.01")  # what configs/base.py says
  )
  jobs, notes = sweep.plan(f"{place}/config.py", place / "out")
  assert [job.name for job in jobs] == ["plain-seed0", "plain-seed1"]
  assert notes == ["zero has the config of plain, whose runs serve both."]


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--out=o"], "--config is missing"),
    (["--config=configs/countdown.py"], "--out is missing"),
    (["--config=nowhere.py", "--out=o"], "nowhere.py is not a file"),
    (["--config=configs/base.py", "--out=o"], "has no sweep()"),
    (["--config=CONFIG", "--out=o", "--jobs=0"], "--jobs=0"),
    (["--config=CONFIG", "--out=o", "--jobs=two"], "--jobs=two"),
    (["--config=CONFIG", "--out=o", "--launcher=lsf"], "slurm"),
    (["--config=CONFIG", "--out=o", "--job=2"], "did you mean --jobs?"),
    (["--config=CONFIG", "--out=o", "--filter=ten"], "fits no run"),
    (
      ["--config=CONFIG", "--out=o", "--config.objective.lamda_=1"],
      "lambda_",
    ),
    (["--config=CONFIG", "--out=o", "--config.run.seed=1"], "seeds"),
    (["--config=CONFIG:smok", "--out=o"], "choose from long"),
    (["--config=CONFIG", "--out=config.py"], "is a file"),
    (["--config=CONFIG", "--out=o", "--launcher_args=-x"], "goes with"),
  ],
)
def test_a_mistake_in_the_command_is_named_and_nothing_is_written(
  place, monkeypatch, words, message
):
  before = sorted(path.name for path in place.iterdir())
  given = [word.replace("CONFIG", f"{place}/config.py") for word in words]
  if not any("configs/" in word for word in given):
    monkeypatch.chdir(place)
  else:
    monkeypatch.chdir(ROOT)
  code, said, err = call(*given)
  assert code == 2, said
  assert err.startswith("error: ")
  assert message in err
  assert "Traceback" not in err
  assert sorted(path.name for path in place.iterdir()) == before


@pytest.mark.parametrize(
  ("entry", "message"),
  [
    ({"name": "a/b"}, "named 'a/b'"),
    ({"name": ".."}, "named '..'"),
    ({}, "named ''"),
    ({"name": "a", "seeds": []}, "seeds=[]"),
    ({"name": "a", "seeds": [1, 1]}, "seeds=[1, 1]"),
    ({"name": "a", "seeds": [True]}, "seeds=[True]"),
    ({"name": "a", "override": {}}, "did you mean 'overrides'?"),
    ({"name": "a", "overrides": {"run.seed": 3}}, "use seeds="),
    ({"name": "a", "seeds": 3}, "give a list, such as [3]"),
    ({"name": "a", "overrides": ["run.steps"]}, "give a dict such as"),
    ({"name": "a", "overrides": {"objective.nam": "x"}}, "objective.name"),
    ("a", "entries are dicts"),
  ],
)
def test_an_entry_that_cannot_be_is_refused_by_name(place, entry, message):
  (place / "bad.py").write_text(
    CONFIG.split("def sweep")[0] + f"def sweep():\n  return [{entry!r}]\n"
  )
  with pytest.raises(ValueError) as caught:
    sweep.plan(f"{place}/bad.py", place / "out")
  assert message in str(caught.value)


def test_a_folder_of_another_config_is_refused(place):
  out = place / "out"
  command = (f"--config={place}/config.py", f"--out={out}", "--filter=plain")
  assert call(*command)[0] == 0
  code, _, err = call(*command, "--config.optimizer.learning_rate=0.5")
  assert code == 2
  assert "optimizer.learning_rate=0.5" in err
  code, _, err = call(
    f"--config={place}/config.py:long", f"--out={out}", "--filter=zero"
  )
  assert code == 2
  assert "run.steps=400 (was 3)" in err
  # Where no folder tells, the manifest does.
  for path in list(out.glob("plain*/*")):
    path.unlink()
  code, _, err = call(f"--config={place}/config.py:long", f"--out={out}")
  assert code == 2
  assert "choose another --out" in err


def test_the_same_config_by_another_path_is_the_same_sweep(place, monkeypatch):
  out = place / "out"
  given = ("--filter=plain-seed0", f"--out={out}")
  assert call(f"--config={place}/config.py", *given)[0] == 0
  monkeypatch.chdir(place)
  code, said, err = call("--config=config.py", *given)
  assert code == 0, err
  assert "1 of 1 runs are finished" in said


def test_a_damaged_manifest_is_named_with_its_remedy(place):
  out = place / "out"
  out.mkdir()
  (out / "sweep.json").write_text('{"config": ')
  code, _, err = call(f"--config={place}/config.py", f"--out={out}")
  assert code == 2
  assert "remove it" in err


@pytest.mark.parametrize(
  ("body", "message"),
  [
    ("1 / 0\ndef sweep():\n  return []\n", "ZeroDivisionError"),
    ("def sweep():\n  raise KeyError('gone')\n", "sweep() of"),
  ],
)
def test_whatever_a_config_file_does_is_a_message(place, body, message):
  (place / "bad.py").write_text(CONFIG.split("def sweep")[0] + body)
  code, _, err = call(f"--config={place}/bad.py", f"--out={place}/out")
  assert code == 2 and message in err and "Traceback" not in err


def test_a_run_with_more_steps_goes_on_where_that_is_accepted(place):
  words = (f"--config={place}/config.py", f"--out={place}/out")
  (place / "cure").touch()
  assert call(*words, "--filter=plain-seed0")[0] == 0
  first = len((place / "out/plain-seed0/steps.txt").read_text().split())
  more = f"--config.run.steps={first + 2}"
  code, _, err = call(*words, "--filter=plain-seed0", more)
  assert code == 2 and "accept_changes=true" in err
  accepted = "--config.run.accept_changes=true"
  assert call(*words, "--filter=plain-seed0", more, accepted)[0] == 0
  steps = (place / "out/plain-seed0/steps.txt").read_text().split()
  assert steps == [str(step) for step in range(first + 2)]


def test_a_sweep_in_a_bucket_is_printed_as_one(place, monkeypatch):
  monkeypatch.chdir(place)
  words = (f"--config={place}/config.py", "--out=gs://bucket/sweep/")
  for launcher in ("xpk", "slurm", "local"):
    code, said, err = call(*words, f"--launcher={launcher}", "--dry_run")
    assert code == 0, err
    assert "--workdir=gs://bucket/sweep/plain-seed0" in said
    assert "gs:/b" not in said.replace("gs://", "")
  assert not (place / "gs:").exists()
