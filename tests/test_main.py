"""The command line: what it accepts, what it refuses, what it says."""

import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import hypothesis
import pytest
import tiny_runs
from hypothesis import strategies as st

from rspo_jax import main
from rspo_jax.config import identity, load
from rspo_jax.run import loop, settings
from rspo_jax.run.runs import Run
from rspo_jax.tools import scores

ROOT = pathlib.Path(__file__).resolve().parent.parent
SUDOKU = str(ROOT / "configs" / "sudoku.py")

pytestmark = pytest.mark.usefixtures("quick_runs")


def argument(command, name):
  """The value that a command gives an option."""
  return next(
    word.partition("=")[2] for word in command if word.startswith(f"--{name}=")
  )


def assert_refused(command, capsys, *said, folder=None):
  """Exit status 2, one clear line, nothing written."""
  folder = pathlib.Path(folder or argument(command, "workdir"))
  before = tiny_runs.files(folder) if folder.is_dir() else folder.exists()
  capsys.readouterr()
  assert main.main(command) == 2
  error = capsys.readouterr().err
  if "--mode=eval" in command:  # where progress goes, too
    error = error[error.index("error: ") :]
  assert error.startswith("error: ") and error.count("\n") == 1, error
  assert "Traceback" not in error and "site-packages" not in error
  for text in said:
    assert text in error, error
  after = tiny_runs.files(folder) if folder.is_dir() else folder.exists()
  assert after == before


# Values of one key that cannot be, by what the message must name besides both.
BAD_VALUES = {
  "a whole number": "rollout.prompts=abc rollout.prompts=1.5 rollout.prompts=",
  "at least 1": (
    "rollout.prompts=0 run.steps=0 run.steps=-3 run.checkpoint_every=0 "
    "run.keep_checkpoints=0 sampler.completion_length=0 eval.batch=0 "
    "eval.samples=0 model.head_chunks=0"
  ),
  "at most": "rollout.prompts=99999999999",
  "2 or more": "rollout.group_size=1",
  "> 0": "rollout.temperature=0",
  "negative": (
    "rollout.temperature=-0.5 run.seed=-1 run.profile=-1 run.samples_every=-1 "
    "run.keep_best=-1 run.keep_every=-2 run.non_finite_limit=-1 "
    "run.collapse_window=-3 run.grace_s=-1.0 optimizer.learning_rate=-1 "
    "optimizer.warmup_steps=-1 optimizer.weight_decay=-1.0 "
    "objective.lambda_=-1.0 eval.prompts=-1 eval.temperature=-1.0 "
    "eval.every=-2 mesh.rollout_tensor=-1 data.seed=-1"
  ),
  "finite": (
    "rollout.temperature=nan optimizer.learning_rate=nan "
    "optimizer.learning_rate=inf"
  ),
  "4294967295": "run.seed=4294967296",
  "true or false": "run.tensorboard=maybe run.accept_changes=perhaps",
  "normal": "run.log=loud",
  "trackio": "run.logger=wandbb",
  "less than run.steps": "run.profile=100",
  "a number": "optimizer.learning_rate=fast eval.samplers=llada+threshold=high",
  "'cosine'": "optimizer.schedule=cosin",
  "[0, 1]": "optimizer.final_share=2.0 data.corrupt_share=1.5",
  "[0, 1)": "optimizer.b1=1.0 optimizer.b2=-0.1",
  "greater than 0": "optimizer.eps=0.0 optimizer.clip_norm=0.0",
  "bfloat16": (
    "optimizer.moment_dtype=float8 model.compute_dtype=fp16 "
    "model.param_dtype=float16"
  ),
  "'rspo'": "objective.name=rsppo",
  "'token'": "objective.lambda_unit=tokens",
  "'group'": "objective.centring=grup",
  "'shared'": "objective.gap_masks=share",
  "likelihood.masks=4": "objective.gap_masks=leave_one_out",
  "'complementary'": "likelihood.scheme=complementry",
  "'canvas'": "likelihood.scope=canvass",
  "use 2": "likelihood.masks=3 likelihood.masks=0",
  "use 2 or 4": "sampler.block_length=5 eval.block_length=3",
  "'llada'": "sampler.algorithm=lada eval.samplers=lada",
  "low_confidence": "sampler.remasking=confidence",
  "'validation'": "eval.split=valid",
  "commas": "eval.completion_lengths=8,x",
  "from 1 on": "eval.completion_lengths=8,0",
  "not negative": "eval.seeds=0,-1",
  "'threshold'": "eval.samplers=llada+thresold=0.9",
  "threshold": "eval.samplers=llada+threshold=0.9+factor=1",
  "use 32": "train.micro_batch=24 train.micro_batch=64",
  "choose from": "train.passes=three",
  "mesh.fsdp=-1": "mesh.fsdp=3",
  "mesh.tensor=1": "mesh.tensor=2",
  "positive": "mesh.data=0",
  "use 1": "mesh.rollout_tensor=3",
  "only one axis": "mesh.data=-1",
  "'sudoku'": "task.name=sudokuu",
  "'compact'": "task.prompt_style=compactt",
  "'strict'": "task.protocol=stict",
  "small": "data.size=medium",
  "not a file": "data.source=nowhere.jsonl",
  "16": "data.prompt_length=15",
  "embedded:": "model.path=",
  "not a folder": "model.path=nowhere",
  "embedded:countdown": "model.path=embedded:contdown",
  "'flash'": "model.attention=flsh",
}


@pytest.mark.parametrize(
  ("word", "said"),
  [(word, said) for said in BAD_VALUES for word in BAD_VALUES[said].split()],
)
def test_a_value_that_cannot_be_is_refused_by_name(
  word, said, tiny, tmp_path, capsys
):
  key, _, value = word.partition("=")
  command = [*tiny(tmp_path / "run"), f"--config.{word}"]
  assert_refused(command, capsys, key, value, said)


# A supervised run of a model that is made from nothing.
NEW = "".join(f"{k}={v}, " for k, v in tiny_runs.SUPERVISED.items())
NEW += "model.path="

# Overrides that cannot be together, and what the message names.
BAD_TOGETHER = [
  ("run.keep_best=1, eval.split=test", ("eval.split='test'", "'validation'")),
  ("sampler.block_length=4, sampler.steps=7", ("steps=7", "use 4 or 8")),
  ("eval.block_length=4, eval.steps=7", ("eval.steps=7", "use 4 or 8")),
  ("train.passes=one, train.micro_batch=2", ("micro_batch=2", "'two'")),
  ("objective.name=sft", ("rollout.group_size=4", "use 1")),
  (
    "sampler.completion_length=64, sampler.block_length=64",
    ("80 tokens", "64", "shorten"),
  ),
  ("task.reward_weights.cels=1.0", ("'cels'", "'cells'")),
  (f"{NEW}, model.new.width=30, model.new.heads=4", ("width=30", "use 32")),
  (f"{NEW}, model.new.kv_heads=2", ("kv_heads=2", "heads=3", "use 1")),
  (f"{NEW}, model.new.layers=0", ("model.new.layers=0", "greater than 0")),
  (f"{NEW}, model.new.vocabulary=0 1 1", ("model.new", "['1']", "distinct")),
  (f"{NEW}, model.new.vocabulary=0 11", ("model.new", "'11'", "pattern")),
  (f"{NEW}, model.new.max_length=16", ("32 tokens", "16", "shorten")),
]


@pytest.mark.parametrize(("overrides", "said"), BAD_TOGETHER)
def test_values_that_cannot_be_together_are_refused(
  overrides, said, tiny, tmp_path, capsys
):
  words = [f"--config.{word}" for word in overrides.split(", ")]
  assert_refused([*tiny(tmp_path / "run"), *words], capsys, *said)


# Words of a command that are wrong, and what the message names.
BAD_WORDS = [
  (["--config.rollout.promts=3"], ("--config.rollout.prompts?",)),
  (["--config.rolout.prompts=3"], ("--config.rollout.prompts or",)),
  (["--config.group_size=3"], ("--config.rollout.group_size?",)),
  (["--rollout.prompts=3"], ("--config.rollout.prompts?",)),
  (["--config.rollout=3"], ("group", "rollout.temperature")),
  (["--config.rollout.prompts.x=3"], ("rollout.prompts.x", "not a key")),
  (["--config.run.steps"], ("--config.run.steps needs a value",)),
  (["--modee=eval"], ("--mode?",)),
  (["--mode=evil"], ("evil", "choose from eval, train")),
  (["--workdirr=x"], ("--workdir?",)),
  (["--frobnicate=1"], ("--frobnicate", "--help")),
  (["train"], ("'train'", "--")),
  (["--workdir"], ("--workdir needs a value",)),
]


@pytest.mark.parametrize(("words", "said"), BAD_WORDS)
def test_words_that_mean_nothing_are_refused_with_the_nearest(
  words, said, tiny, tmp_path, capsys
):
  assert_refused([*tiny(tmp_path / "run"), *words], capsys, *said)


SETS = """from configs import base


def get_config():
  config = base.get_config()
  config.run.{}
  return config
"""
BAD_FILES = [
  ("def get_config(:\n", ("SyntaxError",)),
  ("1 / 0\n", ("ZeroDivisionError", "line 1")),
  ("", ("get_config",)),
  ("def get_config():\n  return {}\n", ("configs.base.get_config",)),
  (SETS.format("promts = 3"), ("run.promts",)),
  (SETS.format("steps = 'many'"), ("TypeError", "steps", "line 6")),
]


@pytest.mark.parametrize(("text", "said"), BAD_FILES)
def test_a_config_file_that_fails_is_refused(text, said, tmp_path, capsys):
  path = tmp_path / "mine.py"
  path.write_text(text)
  command = ["x", f"--config={path}", f"--workdir={tmp_path / 'run'}"]
  assert_refused(command, capsys, str(path), *said)


@pytest.mark.parametrize(
  ("config", "said"),
  [
    (None, ("--config is missing", "configs/countdown.py")),
    ("", ("--config is missing",)),
    (SUDOKU.replace("sudoku", "sudku"), (f"did you mean {SUDOKU}?",)),
    (str(ROOT / "configs"), ("not a file",)),
    (str(ROOT / "README.md"), ("Python file",)),
    (f"{SUDOKU}:smok", ("'smok'", "'smoke'")),
    (f"{SUDOKU}:smoke,callibrated", ("'callibrated'", "'calibrated'")),
  ],
)
def test_a_config_that_is_not_there_is_refused(config, said, tmp_path, capsys):
  command = ["x", f"--workdir={tmp_path / 'run'}"]
  if config is not None:
    command.append(f"--config={config}")
  assert_refused(command, capsys, *said)


# Checkpoints and data.


@pytest.fixture
def broken(tiny, tmp_path):
  """A copy of the tiny checkpoint, to be broken."""
  return shutil.copytree(tiny.checkpoint, tmp_path / "broken")


def cut(path, keep=0.5):
  """Cuts the end of a file off."""
  data = path.read_bytes()
  path.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize(
  ("name", "harm", "said"),
  [
    ("config.json", {"n_heads": 16, "n_kv_heads": 16}, "width=16 / heads=16"),
    ("config.json", {"mask_token_id": 6}, "mask_token_id=6"),
    ("config.json", {"model_type": "bert"}, "'bert'"),
    ("config.json", 0.5, "config.json"),
    ("config.json", None, "config.json"),
    ("model.safetensors", 0.5, "model.safetensors"),
    ("model.safetensors", 0.001, "model.safetensors"),
    ("model.safetensors", None, "safetensors"),
    ("tokenizer.json", 0.5, "tokenizer.json"),
    ("tokenizer.json", None, "tokenizer.json"),
  ],
)
def test_a_damaged_checkpoint_is_refused(
  name, harm, said, tiny, broken, tmp_path, capsys
):
  path = broken / name
  if harm is None:
    path.unlink()
  elif isinstance(harm, dict):
    path.write_text(json.dumps(json.loads(path.read_text()) | harm))
  else:
    cut(path, harm)
  command = tiny(tmp_path / "run", model__path=broken)
  assert_refused(command, capsys, said)


@pytest.mark.parametrize(
  ("rows", "said"),
  [
    ("", ("rows.jsonl", "no rows")),
    ('{"puzzle": "1', ("rows.jsonl:1:",)),
    ('{"puzzle": "1", "solution": "1"}\n', ("rows.jsonl:1:", "16 digits")),
    ('{"question": "1"}\n', ("rows.jsonl:1:", "puzzle")),
    # The tokenizer of the tiny model spells digits alone.
    (
      '{"numbers": [1, 2, 3], "target": 6, "solution": "1+2+3"}\n',
      ("','", "vocabulary"),
    ),
  ],
)
def test_data_that_cannot_be_used_is_refused(
  rows, said, tiny, tmp_path, capsys
):
  path = tmp_path / "rows.jsonl"
  path.write_text(rows)
  more = {"task__name": "countdown"} if "numbers" in rows else {}
  command = tiny(
    tmp_path / "run", data__source=path, eval__split="test", **more
  )
  assert_refused(command, capsys, *said)


# Folders.


def test_a_workdir_that_cannot_be_used_is_refused(tiny, tmp_path, capsys):
  file = tmp_path / "file"
  file.write_text("")
  assert_refused(tiny(file), capsys, str(file), "is a file")
  below = file / "run"
  assert_refused(tiny(below), capsys, str(below), "choose a folder")
  long = tmp_path / ("x" * 300)
  with pytest.raises(OSError, match="name too long"):
    long.exists()
  assert_refused(tiny(long), capsys, "name too long", folder=tmp_path)
  for strange in ("s3://bucket/run", "gs://bucket", "gs://bucket/../run"):
    assert_refused(tiny(strange), capsys, strange, folder=tmp_path)


def test_a_link_that_leads_nowhere_is_refused_as_a_folder(
  tiny, tmp_path, capsys
):
  link = tmp_path / "link"
  link.symlink_to(tmp_path / "gone")
  for folder in (link, link / "run"):
    assert_refused(
      tiny(folder), capsys, f"{link} is a symbolic link", "remove the link"
    )
  assert sorted(tmp_path.iterdir()) == [link]


@pytest.mark.skipif(
  not pathlib.Path("/proc/self").exists(), reason="no /proc to write to"
)
def test_a_folder_that_refuses_is_found_out_even_by_root(tiny, capsys):
  # Permission bits would let root in.
  assert_refused(tiny("/proc/run"), capsys, "/proc/run", "written")


def test_a_folder_of_something_else_is_refused(tiny, tmp_path, capsys):
  (tmp_path / "thesis.txt").write_text("years of work")
  assert_refused(tiny(tmp_path), capsys, "thesis.txt", "new folder")


@pytest.mark.parametrize(
  ("text", "said"),
  [("{", "cannot be read"), ('{"model_type": "llada"}', "not the config")],
)
def test_a_config_json_of_something_else_is_refused(
  text, said, tiny, tmp_path, capsys
):
  (tmp_path / "config.json").write_text(text)
  assert_refused(tiny(tmp_path), capsys, "config.json", said)
  assert_refused([*tiny(tmp_path), "--mode=eval"], capsys, "config.json", said)


def test_a_run_with_another_config_is_refused_naming_the_keys(
  tiny, whole, capsys
):
  command = tiny(whole, run__tensorboard=True, rollout__temperature=0.7)
  said = ("rollout.temperature=0.7 (was 1.0)", "another --workdir")
  assert_refused(command, capsys, *said)


def test_keys_that_only_say_where_and_how_may_change(tiny, whole, capsys):
  command = tiny(whole, run__log="debug", run__keep_checkpoints=1)
  assert main.main(command) == 0
  assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("variables", "said"),
  [
    ({"JAX_COORDINATOR_ADDRESS": "x:1"}, "JAX_NUM_PROCESSES"),
    (
      {
        "JAX_COORDINATOR_ADDRESS": "x:1",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "2",
      },
      "JAX_PROCESS_ID=2",
    ),
  ],
)
def test_processes_that_do_not_add_up_are_refused(
  variables, said, tiny, tmp_path, monkeypatch, capsys
):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  assert_refused(tiny(tmp_path / "run"), capsys, said)


# As real processes.


def run_process(*words, code=None):
  """Runs a command; returns what came of it and its seconds of CPU."""
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  what = ["-c", code] if code else ["-m", "rspo_jax.main"]
  done = subprocess.run(
    [sys.executable, *what, *words],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
  return done, used


def test_mistakes_end_a_process_with_2_within_5_seconds(tiny, broken, tmp_path):
  cut(broken / "model.safetensors")
  valid = tiny(tmp_path / "run")
  commands = [
    tiny(tmp_path / "run", model__path=broken),
    [*valid, "--config.rollout.promts=3"],
    [*valid, "--config.run.steps=many"],
    [*valid, "--config.data.source=nowhere.jsonl"],
    [*valid, "--config=configs/nothing.py"],
    tiny("/proc/run"),
  ]
  for command in commands:
    done, cpu_s = run_process(*command[1:])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert cpu_s < 5
    assert not (tmp_path / "run").exists()


# Stands in for the module that imports JAX.
FIRST_LINE = """
import sys, types
from rspo_jax.config import load
from rspo_jax import main
train = types.ModuleType("rspo_jax.run.loop")
train.main = lambda *_: print("jax" in sys.modules, "numpy" in sys.modules)
sys.modules["rspo_jax.run.loop"] = train
main.main(sys.argv)
"""


def test_the_first_line_comes_before_jax(tiny, tmp_path):
  done, cpu_s = run_process(*tiny(tmp_path / "run")[1:], code=FIRST_LINE)
  first, second = done.stdout.splitlines()
  assert first == f"train: sudoku in {tmp_path / 'run'}"
  assert second.startswith("False")
  assert cpu_s < 3


# Reading a command.


@pytest.mark.parametrize("word", ["--help", "-h", "-help", "--helpfull"])
def test_help_needs_nothing_else(word, capsys):
  assert main.main(["x", word, "--nonsense"]) == 0
  assert "--workdir=DIR" in capsys.readouterr().out


def test_overrides_have_the_type_of_their_key():
  command = ["x", f"--config={SUDOKU}", "--config.run.steps", "7"]
  command += ["-config.mesh.data=-1", "--config.run.export=FALSE"]
  command += ["--config.optimizer.learning_rate=1", "--config.data.dir=12"]
  command += ["--config.task.reward_weights.cells=0.5"]
  command += ["--config.run.seed=1", "--config.run.seed=2"]
  config, name, workdir, mode = load.parse(command)
  assert (name, workdir, mode) == ("sudoku", "", "train")
  assert config.run.steps == 7 and config.mesh.data == -1
  assert config.run.export is False
  assert config.optimizer.learning_rate == 1.0
  assert type(config.optimizer.learning_rate) is float
  assert config.data.dir == "12"
  assert config.task.reward_weights.to_dict() == {"cells": 0.5}
  assert config.run.seed == 2  # the last word counts
  with pytest.raises(AttributeError):
    config.run.stepz = 3


def test_arguments_of_a_config_combine_and_overrides_come_after():
  config = load.parse(
    ["x", f"--config={SUDOKU}:smoke,paper_literal", "--config.run.steps=9"]
  )[0]
  plain = load.parse(["x", f"--config={SUDOKU}"])[0]
  assert config.run.steps == 9
  assert config.objective.lambda_ == 0.01 != plain.objective.lambda_
  assert config.eval.prompts < plain.eval.prompts


def test_the_default_workdir_names_the_resolved_config(monkeypatch, capsys):
  given = []
  monkeypatch.setattr(loop, "main", lambda *args: given.append(args) or 0)
  steps = load.parse(["x", f"--config={SUDOKU}"])[0].run.steps
  for words in (
    [],
    [f"--config.run.steps={steps}"],
    [f"--config.run.steps={steps + 1}"],
  ):
    assert main.main(["x", f"--config={SUDOKU}", *words]) == 0
  folders = [folder for _, folder, _ in given]
  assert folders[0] == folders[1] != folders[2]
  assert all(folder.startswith("runs/sudoku-") for folder in folders)
  assert capsys.readouterr().out.splitlines() == [
    f"train: sudoku in {folder}" for folder in folders
  ]


# Evaluation.


def evaluate(command, capsys):
  """The line that an evaluation prints, and nothing else."""
  capsys.readouterr()
  assert main.main([*command, "--mode=eval"]) == 0
  out = capsys.readouterr().out
  assert out.count("\n") == 1 and out.endswith("\n")
  return json.loads(out)


def repeats(key):
  """Whether a metric is the same every time."""
  return "/" in key and not key.endswith("_per_s")


def test_eval_of_a_run_repeats_its_last_evaluation(
  tiny, whole, tmp_path, capsys
):
  folder = shutil.copytree(whole, tmp_path / "run")
  before = tiny_runs.files(folder)
  line = evaluate(tiny(folder), capsys)
  last = tiny_runs.rows(whole)[-1]
  assert {k: v for k, v in line.items() if repeats(k)} == {
    k: v for k, v in last.items() if k.startswith("eval/") and repeats(k)
  }
  assert line["step"] == last["step"] and line["split"] == "validation"
  assert line["model"] == f"{folder}/checkpoints at step {last['step']}"
  after = tiny_runs.files(folder)
  written = after.keys() - before.keys()
  assert {k: after[k] for k in before} == before
  assert len(written) == 3 and all(k.startswith("eval/") for k in written)
  (summary,) = (name for name in written if name.endswith(".json"))
  assert json.loads(after[summary]) == line
  for name in written - {summary}:
    kind = name.rpartition("-")[2]
    sample = folder / "samples" / f"eval-{last['step']:06d}-{kind}"
    assert after[name] == sample.read_bytes()
    rows = [json.loads(text) for text in after[name].splitlines()]
    assert len(rows) == line["eval/n"]
    assert {"prompt", "completion", "verdict"} <= rows[0].keys()


def test_eval_of_a_model_makes_no_run_of_a_folder(
  tiny, whole, tmp_path, capsys
):
  folder = tmp_path / "run"
  line = evaluate(tiny(folder), capsys)
  assert line["model"] == str(tiny.checkpoint)
  first = tiny_runs.rows(whole)[0]
  assert line["eval/reward_sampled"] == first["eval/reward_sampled"]
  assert [path.name for path in folder.iterdir()] == ["eval"]
  # Once more in the same folder, and then a run.
  again = evaluate(tiny(folder), capsys)
  assert {k: v for k, v in again.items() if not k.endswith("per_s")} == {
    k: v for k, v in line.items() if not k.endswith("per_s")
  }
  assert main.main(tiny(folder)) == 0
  assert tiny_runs.repeatable(folder) == tiny_runs.repeatable(whole)


def test_eval_has_its_own_length_and_split(tiny, whole, tmp_path, capsys):
  command = tiny(
    whole,
    eval__completion_length=8,
    eval__split="test",
    eval__prompts=3,
    run__compilation_cache="",
  )
  folder = tmp_path / "run"
  command.append(f"--workdir={folder}")
  command.append(f"--config.model.path={whole / 'model'}")
  line = evaluate(command, capsys)
  assert line["completion_length"] == 8 and line["split"] == "test"
  assert line["eval/n"] == 3 and line["eval/length_mean"] <= 8
  assert line["model"] == str(whole / "model")
  for path in (folder / "eval").glob("*.jsonl"):
    for text in path.open():
      row = json.loads(text)
      assert row["length"] <= 8 and len(row["completion"]) <= 8


def test_several_evaluations_are_one_command(tiny, tmp_path, capsys):
  folder = tmp_path / "run"
  command = tiny(
    folder,
    eval__completion_lengths="8,16",
    eval__samplers="entropy+top_k=3",
    eval__seeds="3,4",
    eval__samples=2,
    eval__prompts=5,
    eval__d1_files="true",
  )
  assert main.main([*command, "--mode=eval"]) == 0
  out, err = capsys.readouterr()
  lines = [json.loads(text) for text in out.splitlines()]
  combinations = [(8, 3), (8, 4), (16, 3), (16, 4)]
  told = [(line["completion_length"], line["seed"]) for line in lines]
  assert told == combinations
  assert {line["sampler"] for line in lines} == {"entropy+top_k=3"}
  assert {path.name for path in (folder / "eval").glob("*.json*")} == {
    f"validation-{length}-entropy+top_k=3-seed{seed}-step000000{end}"
    for length, seed in combinations
    for end in (".json", "-greedy.jsonl", "-sampled.jsonl")
  }
  # Another seed is other samples of the same greedy policy.
  assert lines[0]["eval/reward"] == lines[1]["eval/reward"]
  sampled = (folder / "eval").glob("*-sampled.jsonl")
  assert len({path.read_text() for path in sampled}) == len(lines)
  for line in lines:
    assert line["eval/pass_at_2"] >= line["eval/pass_at_1"]
    assert line["eval/n"] == sum(row["n"] for row in line["by_difficulty"]) == 5
  # The table over all of them, on the terminal and from the files.
  assert "sampled, 95 %" in err
  assert scores.main([str(folder)]) == 0
  table = capsys.readouterr().out.splitlines()
  assert len(table) == 2 + len(lines)
  header = [cell.strip() for cell in table[0].strip("|").split("|")]
  assert header[:2] == ["length", "seed"]
  # d1's layout.
  paths = sorted((folder / "eval" / "d1").rglob("*_generations.json"))
  assert len(paths) == len(lines)
  document = json.loads(paths[0].read_text())
  assert document["gen_length"] in (8, 16)
  for row in document["generations"]:
    question = f"Solve the following Sudoku puzzle: {row['prompt_input']}\n"
    assert row["question"] == question


def test_eval_of_nothing_is_refused(tiny, whole, tmp_path, capsys):
  values = {k.replace(".", "__"): v for k, v in tiny_runs.SUPERVISED.items()}
  new = [*tiny(tmp_path / "run", **values, model__path=""), "--mode=eval"]
  assert_refused(new, capsys, "nothing to evaluate", "model.path")
  folder = shutil.copytree(whole, tmp_path / "damaged")
  for path in (folder / "checkpoints").rglob("commit.json"):
    cut(path)
  command = [*tiny(folder), "--mode=eval"]
  assert_refused(command, capsys, "checkpoint", str(folder))


def test_an_evaluation_that_is_asked_to_stop_ends_with_75(
  tiny, tmp_path, monkeypatch, capsys
):
  original = Run.stop_if_asked

  def asked(run, *args):
    signal.raise_signal(signal.SIGTERM)
    while not run.interrupt.requested:
      time.sleep(1e-3)
    original(run, *args)

  monkeypatch.setattr(Run, "stop_if_asked", asked)
  assert main.main([*tiny(tmp_path / "run"), "--mode=eval"]) == 75
  captured = capsys.readouterr()
  assert captured.out == "" and "SIGTERM" in captured.err
  assert not (tmp_path / "run").exists()


# Anything at all.

TEXTS = st.one_of(
  st.text(max_size=12),
  st.integers().map(str),
  st.floats().map(str),
  st.sampled_from(["True", "False", "None", "{}", "[1]", "1e3", "0x10"]),
)


ANYTHING = hypothesis.settings(
  max_examples=300,
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


@ANYTHING
@hypothesis.given(st.data())
def test_any_override_is_taken_or_refused_in_words(tiny, data):
  config = load.load_config(SUDOKU)
  keys = sorted(identity.flat(config.to_dict()))
  config.model.path = str(tiny.checkpoint)
  for _ in range(data.draw(st.integers(1, 3))):
    key = data.draw(st.sampled_from(keys))
    try:
      load.override(config, key, data.draw(TEXTS))
    except ValueError as error:
      assert key in str(error)
      return
  try:
    built = settings.build(config, data.draw(st.sampled_from([1, 2, 8])))
  except ValueError as error:
    assert str(error)
  else:
    assert built.run.steps == config.run.steps


@ANYTHING
@hypothesis.given(st.lists(st.text(max_size=20), max_size=3))
def test_any_words_are_understood_or_refused_in_words(words):
  try:
    load.parse(["x", f"--config={SUDOKU}", *words])
  except ValueError as error:
    assert str(error)


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.text(max_size=5),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(
      st.sampled_from(["model", "task", "run", "objective", "path", "steps"]),
      inner,
      max_size=5,
    )
  ),
  max_leaves=12,
)


@ANYTHING
@hypothesis.given(JSON.map(lambda x: json.dumps(x).encode()) | st.binary())
def test_any_config_json_in_a_folder_is_ours_or_refused(tmp_path, content):
  config = load.load_config(SUDOKU).to_dict()
  (tmp_path / "config.json").write_bytes(content)
  for mode in load.MODES:
    try:
      identity.check_workdir(str(tmp_path), config, mode)
    except ValueError as error:
      assert str(tmp_path) in str(error)
    else:
      assert mode == "eval"
