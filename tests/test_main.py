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

from rspo_jax import main, run_config, scores, settings, train
from rspo_jax.runs import Run

ROOT = pathlib.Path(__file__).resolve().parent.parent
SUDOKU = str(ROOT / "configs" / "sudoku.py")

pytestmark = pytest.mark.usefixtures("quick_runs")


def argument(command, name):
  """The value that a command gives an option."""
  return next(
    word.partition("=")[2] for word in command if word.startswith(f"--{name}=")
  )


def with_key(command, key, value):
  """A command with one more override, the last one for its key."""
  return [*command, f"--config.{key}={value}"]


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


# Values of one key that cannot be: key, value, what the message must name
# besides both.
BAD_VALUES = [
  ("rollout.prompts", "abc", "a whole number"),
  ("rollout.prompts", "1.5", "a whole number"),
  ("rollout.prompts", "", "a whole number"),
  ("rollout.prompts", "0", "at least 1"),
  ("rollout.prompts", "99999999999", "at most"),
  ("rollout.group_size", "1", "2 or more"),
  ("rollout.temperature", "0", "> 0"),
  ("rollout.temperature", "-0.5", "negative"),
  ("rollout.temperature", "nan", "finite"),
  ("run.steps", "0", "at least 1"),
  ("run.steps", "-3", "at least 1"),
  ("run.seed", "-1", "negative"),
  ("run.seed", "4294967296", "4294967295"),
  ("run.tensorboard", "maybe", "true or false"),
  ("run.log", "loud", "normal"),
  ("run.logger", "wandbb", "trackio"),
  ("run.profile", "100", "less than run.steps"),
  ("run.profile", "-1", "negative"),
  ("run.checkpoint_every", "0", "at least 1"),
  ("run.keep_checkpoints", "0", "at least 1"),
  ("run.samples_every", "-1", "negative"),
  ("run.keep_best", "-1", "negative"),
  ("run.keep_every", "-2", "negative"),
  ("run.non_finite_limit", "-1", "negative"),
  ("run.collapse_window", "-3", "negative"),
  ("run.grace_s", "-1.0", "negative"),
  ("run.accept_changes", "perhaps", "true or false"),
  ("optimizer.learning_rate", "fast", "a number"),
  ("optimizer.learning_rate", "nan", "finite"),
  ("optimizer.learning_rate", "inf", "finite"),
  ("optimizer.learning_rate", "-1", "negative"),
  ("optimizer.schedule", "cosin", "'cosine'"),
  ("optimizer.warmup_steps", "-1", "negative"),
  ("optimizer.final_share", "2.0", "[0, 1]"),
  ("optimizer.b1", "1.0", "[0, 1)"),
  ("optimizer.b2", "-0.1", "[0, 1)"),
  ("optimizer.eps", "0.0", "greater than 0"),
  ("optimizer.clip_norm", "0.0", "greater than 0"),
  ("optimizer.weight_decay", "-1.0", "negative"),
  ("optimizer.moment_dtype", "float8", "bfloat16"),
  ("objective.name", "rsppo", "'rspo'"),
  ("objective.lambda_", "-1.0", "negative"),
  ("objective.lambda_unit", "tokens", "'token'"),
  ("objective.centring", "grup", "'group'"),
  ("objective.gap_masks", "share", "'shared'"),
  ("objective.gap_masks", "leave_one_out", "likelihood.masks=4"),
  ("likelihood.scheme", "complementry", "'complementary'"),
  ("likelihood.scope", "canvass", "'canvas'"),
  ("likelihood.masks", "3", "use 2"),
  ("likelihood.masks", "0", "use 2"),
  ("sampler.completion_length", "0", "at least 1"),
  ("sampler.block_length", "5", "use 2 or 4"),
  ("sampler.algorithm", "lada", "'llada'"),
  ("sampler.remasking", "confidence", "low_confidence"),
  ("eval.block_length", "3", "use 2 or 4"),
  ("eval.split", "valid", "'validation'"),
  ("eval.batch", "0", "at least 1"),
  ("eval.prompts", "-1", "negative"),
  ("eval.temperature", "-1.0", "negative"),
  ("eval.every", "-2", "negative"),
  ("eval.samples", "0", "at least 1"),
  ("eval.completion_lengths", "8,x", "commas"),
  ("eval.completion_lengths", "8,0", "from 1 on"),
  ("eval.seeds", "0,-1", "not negative"),
  ("eval.samplers", "lada", "'llada'"),
  ("eval.samplers", "llada+thresold=0.9", "'threshold'"),
  ("eval.samplers", "llada+threshold=high", "a number"),
  ("eval.samplers", "llada+threshold=0.9+factor=1", "threshold"),
  ("train.micro_batch", "24", "use 32"),
  ("train.micro_batch", "64", "use 32"),
  ("train.passes", "three", "choose from"),
  ("mesh.fsdp", "3", "mesh.fsdp=-1"),
  ("mesh.tensor", "2", "mesh.tensor=1"),
  ("mesh.data", "0", "positive"),
  ("mesh.rollout_tensor", "3", "use 1"),
  ("mesh.rollout_tensor", "-1", "negative"),
  ("mesh.data", "-1", "only one axis"),
  ("task.name", "sudokuu", "'sudoku'"),
  ("task.prompt_style", "compactt", "'compact'"),
  ("task.protocol", "stict", "'strict'"),
  ("data.size", "medium", "small"),
  ("data.seed", "-1", "negative"),
  ("data.source", "nowhere.jsonl", "not a file"),
  ("data.prompt_length", "15", "16"),
  ("data.corrupt_share", "1.5", "[0, 1]"),
  ("model.path", "", "embedded:"),
  ("model.path", "nowhere", "not a folder"),
  ("model.path", "embedded:contdown", "embedded:countdown"),
  ("model.compute_dtype", "fp16", "bfloat16"),
  ("model.param_dtype", "float16", "bfloat16"),
  ("model.attention", "flsh", "'flash'"),
  ("model.head_chunks", "0", "at least 1"),
]


@pytest.mark.parametrize(("key", "value", "said"), BAD_VALUES)
def test_a_value_that_cannot_be_is_refused_by_name(
  key, value, said, tiny, tmp_path, capsys
):
  command = with_key(tiny(tmp_path / "run"), key, value)
  assert_refused(command, capsys, key, value, said)


# Overrides that cannot be together, and what the message names.
BAD_TOGETHER = [
  (
    {"run__keep_best": 1, "eval__split": "test"},
    ("run.keep_best=1", "eval.split='test'", "'validation'"),
  ),
  (
    {"sampler__block_length": 4, "sampler__steps": 7},
    ("sampler.steps=7", "use 4 or 8"),
  ),
  (
    {"eval__block_length": 4, "eval__steps": 7},
    ("eval.steps=7", "use 4 or 8"),
  ),
  (
    {"train__passes": "one", "train__micro_batch": 2},
    ("train.passes='one'", "train.micro_batch=2", "'two'"),
  ),
  ({"objective__name": "sft"}, ("rollout.group_size=4", "use 1")),
  (
    {"sampler__completion_length": 64, "sampler__block_length": 64},
    ("80 tokens", "64", "shorten"),
  ),
  (
    {"task__reward_weights__cels": 1.0},
    ("task.reward_weights", "'cels'", "'cells'"),
  ),
]


@pytest.mark.parametrize(("overrides", "said"), BAD_TOGETHER)
def test_values_that_cannot_be_together_are_refused(
  overrides, said, tiny, tmp_path, capsys
):
  command = tiny(tmp_path / "run", **overrides)
  assert_refused(command, capsys, *said)


BAD_NEW_MODELS = [
  ({"model__new__width": 30, "model__new__heads": 4}, ("width=30", "use 32")),
  ({"model__new__kv_heads": 2}, ("kv_heads=2", "heads=3", "use 1")),
  ({"model__new__layers": 0}, ("model.new.layers=0", "greater than 0")),
  ({"model__new__vocabulary": "0 1 1"}, ("model.new", "['1']", "distinct")),
  ({"model__new__vocabulary": "0 11"}, ("model.new", "'11'", "pattern")),
  ({"model__new__max_length": 16}, ("32 tokens", "16", "shorten")),
]


@pytest.mark.parametrize(("overrides", "said"), BAD_NEW_MODELS)
def test_a_new_model_that_cannot_be_is_refused(
  overrides, said, tiny, tmp_path, capsys
):
  values = {k.replace(".", "__"): v for k, v in tiny_runs.SUPERVISED.items()}
  command = tiny(tmp_path / "run", **values, model__path="", **overrides)
  assert_refused(command, capsys, *said)


# Words of a command that are wrong, and what the message names.
BAD_WORDS = [
  (["--config.rollout.promts=3"], ("--config.rollout.prompts?",)),
  (["--config.rolout.prompts=3"], ("--config.rollout.prompts?",)),
  (["--config.group_size=3"], ("--config.rollout.group_size?",)),
  (["--rollout.prompts=3"], ("--config.rollout.prompts?",)),
  (["--config.rollout=3"], ("group", "rollout.temperature")),
  (["--config.rollout.prompts.x=3"], ("rollout.prompts.x", "not a key")),
  (["--config.run.steps"], ("--config.run.steps needs a value",)),
  (["--modee=eval"], ("--mode?",)),
  (["--mode=evil"], ("evil", "--mode=eval")),
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


BAD_FILES = [
  ("def get_config(:\n", ("SyntaxError",)),
  ("1 / 0\n", ("ZeroDivisionError", "line 1")),
  ("", ("get_config",)),
  ("def get_config():\n  return {}\n", ("configs.base.get_config",)),
  (
    "from configs import base\n\n\ndef get_config():\n"
    "  config = base.get_config()\n  config.rollout.promts = 3\n"
    "  return config\n",
    ("rollout.promts",),
  ),
  (
    "from configs import base\n\n\ndef get_config():\n"
    "  config = base.get_config()\n  config.run.steps = 'many'\n"
    "  return config\n",
    ("TypeError", "steps", "line 6"),
  ),
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


def edit(path, **values):
  """Changes entries of a JSON file."""
  path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
  ("harm", "said"),
  [
    (
      lambda f: edit(f / "config.json", n_heads=16, n_kv_heads=16),
      ("width=16 / heads=16", "even"),
    ),
    (
      lambda f: edit(f / "config.json", mask_token_id=6),
      ("mask_token_id=6", "id 5"),
    ),
    (lambda f: edit(f / "config.json", model_type="bert"), ("'bert'",)),
    (lambda f: cut(f / "model.safetensors"), ("model.safetensors",)),
    (lambda f: cut(f / "model.safetensors", 0.001), ("model.safetensors",)),
    (lambda f: (f / "model.safetensors").unlink(), ("safetensors",)),
    (lambda f: cut(f / "config.json"), ("config.json",)),
    (lambda f: (f / "config.json").unlink(), ("config.json",)),
    (lambda f: cut(f / "tokenizer.json"), ("tokenizer.json",)),
    (lambda f: (f / "tokenizer.json").unlink(), ("tokenizer.json",)),
  ],
)
def test_a_damaged_checkpoint_is_refused(
  harm, said, tiny, broken, tmp_path, capsys
):
  harm(broken)
  command = tiny(tmp_path / "run", model__path=broken)
  assert_refused(command, capsys, *said)


@pytest.mark.parametrize(
  ("rows", "said"),
  [
    ("", ("no rows",)),
    ('{"puzzle": "1', (":1:",)),
    ('{"puzzle": "1", "solution": "1"}\n', (":1:", "16 digits")),
    ('{"question": "1"}\n', (":1:", "puzzle")),
  ],
)
def test_data_that_cannot_be_used_is_refused(
  rows, said, tiny, tmp_path, capsys
):
  path = tmp_path / "rows.jsonl"
  path.write_text(rows)
  command = tiny(tmp_path / "run", data__source=path)
  assert_refused(command, capsys, str(path), *said)


def test_prompts_that_the_tokenizer_cannot_spell_are_refused(
  tiny, tmp_path, capsys
):
  path = tmp_path / "rows.jsonl"
  row = {"numbers": [1, 2, 3], "target": 6, "solution": "1+2+3"}
  path.write_text(json.dumps(row) + "\n")
  command = tiny(
    tmp_path / "run",
    task__name="countdown",
    data__source=str(path),
    eval__split="test",
  )
  assert_refused(command, capsys, "','", "vocabulary")


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
  commands = [
    tiny(tmp_path / "run", model__path=broken),
    with_key(tiny(tmp_path / "run"), "rollout.promts", 3),
    with_key(tiny(tmp_path / "run"), "run.steps", "many"),
    with_key(tiny(tmp_path / "run"), "data.source", "nowhere.jsonl"),
    [*tiny(tmp_path / "run"), "--config=configs/nothing.py"],
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
from rspo_jax import main
train = types.ModuleType("rspo_jax.train")
train.main = lambda *_: print("jax" in sys.modules, "numpy" in sys.modules)
sys.modules["rspo_jax.train"] = train
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
  config, name, workdir, mode = main.parse(command)
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
  config = main.parse(
    ["x", f"--config={SUDOKU}:smoke,paper_literal", "--config.run.steps=9"]
  )[0]
  plain = main.parse(["x", f"--config={SUDOKU}"])[0]
  assert config.run.steps == 9
  assert config.objective.lambda_ == 0.01 != plain.objective.lambda_
  assert config.eval.prompts < plain.eval.prompts


def test_the_default_workdir_names_the_resolved_config(monkeypatch, capsys):
  given = []
  monkeypatch.setattr(train, "main", lambda *args: given.append(args) or 0)
  monkeypatch.setattr(main.config_checks, "check_values", lambda config: None)
  steps = main.parse(["x", f"--config={SUDOKU}"])[0].run.steps
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
  assert len({line["eval/reward_sampled"] for line in lines}) == 4
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


@hypothesis.settings(
  max_examples=300,
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(st.data())
def test_any_override_is_taken_or_refused_in_words(tiny, data):
  config = main.load_config(SUDOKU)
  keys = sorted(run_config.flat(config.to_dict()))
  config.model.path = str(tiny.checkpoint)
  for _ in range(data.draw(st.integers(1, 3))):
    key = data.draw(st.sampled_from(keys))
    try:
      main.override(config, key, data.draw(TEXTS))
    except ValueError as error:
      assert key in str(error)
      return
  try:
    built = settings.build(config, data.draw(st.sampled_from([1, 2, 8])))
  except ValueError as error:
    assert str(error)
  else:
    assert built.run.steps == config.run.steps


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(st.lists(st.text(max_size=20), max_size=3))
def test_any_words_are_understood_or_refused_in_words(words):
  try:
    main.parse(["x", f"--config={SUDOKU}", *words])
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


@hypothesis.settings(
  max_examples=200,
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(JSON.map(lambda x: json.dumps(x).encode()) | st.binary())
def test_any_config_json_in_a_folder_is_ours_or_refused(tmp_path, content):
  config = main.load_config(SUDOKU).to_dict()
  (tmp_path / "config.json").write_bytes(content)
  for mode in main.MODES:
    try:
      run_config.check_workdir(str(tmp_path), config, mode)
    except ValueError as error:
      assert str(tmp_path) in str(error)
    else:
      assert mode == "eval"
