"""Configs: every key is read, every argument builds, every command parses."""

import ast
import itertools
import pathlib
import re
import shlex

import pytest

import rspo_jax
from configs import base
from rspo_jax.config import identity, keys, load, schema
from rspo_jax.models import lora
from rspo_jax.run import settings
from rspo_jax.tasks import TASKS

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = sorted(
  path.stem
  for path in (ROOT / "configs").glob("*.py")
  if path.stem not in ("__init__", "base", "recipes")
)
# They need a checkpoint and data of the user's.
REAL = ("gsm8k", "math500")


def config_of(name, arg=""):
  """The config of configs/NAME.py:ARG."""
  path = f"{ROOT}/configs/{name}.py"
  return load.load_config(f"{path}:{arg}" if arg else path)


def switches(name):
  """The arguments of a config, as it names them itself."""
  with pytest.raises(ValueError, match="choose from") as error:
    config_of(name, "no_such_switch")
  names = str(error.value).partition("choose from ")[2].rstrip(".")
  return names.split(", ")


def docstring(name):
  """The docstring of a config file."""
  path = ROOT / "configs" / f"{name}.py"
  return ast.get_docstring(ast.parse(path.read_text()))


EVERY = [(name, arg) for name in FILES for arg in ("", *switches(name)) if name]


def test_the_files_of_the_contract_are_there():
  wanted = {"countdown", "sudoku", "gsm8k", "math500"}
  assert wanted | {"sft_countdown", "sft_sudoku"} <= set(FILES)
  for name in ("countdown", "sudoku"):
    assert {"smoke", "calibrated", "paper_literal"} <= set(switches(name))


@pytest.mark.parametrize(("name", "arg"), EVERY)
def test_every_argument_builds(name, arg, tiny):
  config = config_of(name, arg)
  if (
    name in REAL
    or config.model.published
    or (config.model.path and not config.model.path.startswith("embedded:"))
  ):
    with pytest.raises(ValueError, match=r"model\.path="):
      settings.build(config, 1)
    config.model.path = str(tiny.checkpoint)
  built = settings.build(config, 1)
  assert built.task.name in TASKS
  if arg == "smoke":
    assert built.run.steps <= 10
  else:
    settings.build(config, 4)


def derived(name, one, other):
  """What an argument works out from one that stands before it.

  The quadrature's form follows from the length of completions, which another
  model changes; the study's steps from the cost of one.
  """
  keys = set()
  if other == "gdpo" and one in ("llada_8b", "dream_7b"):
    keys.add("likelihood.scheme")
  if name.startswith("study"):
    keys.add("run.steps")
  return keys


@pytest.mark.parametrize("name", FILES)
def test_arguments_combine_and_the_last_one_wins(name):
  for one, other in itertools.permutations(switches(name), 2):
    both = identity.flat(config_of(name, f"{one},{other}").to_dict())
    if other in base.FIRST and one not in base.FIRST:
      turned = identity.flat(config_of(name, f"{other},{one}").to_dict())
      assert both == turned, (one, other)
      continue
    if {one, other} <= {*base.FIRST} and one == "full":
      continue  # a model goes in front of it
    last = identity.flat(config_of(name, other).to_dict())
    plain = identity.flat(config_of(name).to_dict())
    for key in last.keys() - derived(name, one, other):
      value = last[key]
      if value != plain[key]:
        assert both[key] == value, (one, other, key)


@pytest.mark.parametrize("name", FILES)
def test_every_argument_is_documented(name):
  text = docstring(name)
  for other in re.findall(r"configs/(\w+)\.py", text):
    text += docstring(other)
  for switch in switches(name):
    assert re.search(rf"[`:,]{switch}\b", text), switch


@pytest.mark.parametrize("name", FILES)
def test_the_commands_of_the_docstring_parse(name):
  text = docstring(name).replace("\\\n", " ")
  commands = re.findall(r"^ +python -m (rspo_jax\.main .*)$", text, re.M)
  assert commands
  for command in commands:
    words = shlex.split(command.replace("=configs/", f"={ROOT}/configs/"))
    config, found, _, mode = load.parse(words)
    assert found == name and mode == "train"
    assert config.is_locked


# Keys.


def sources():
  """Every module of the package as a syntax tree."""
  for path in sorted((ROOT / "rspo_jax").rglob("*.py")):
    yield path, ast.parse(path.read_text())


def test_every_key_is_read():
  read = set()
  for _, tree in sources():
    for node in ast.walk(tree):
      if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        read.add(node.attr)
      elif isinstance(node, ast.Subscript):
        key = node.slice
        read |= {key.value} if isinstance(key, ast.Constant) else set()
      elif isinstance(node, ast.Call) and node.args:
        # The new model's shape is taken apart by name.
        key = node.args[0]
        read |= {key.value} if isinstance(key, ast.Constant) else set()
      elif isinstance(node, ast.arg):
        # mesh and new model: groups that are passed as keywords.
        read.add(node.arg)
  for key in identity.flat(base.get_config().to_dict()):
    assert key.rpartition(".")[2] in read, f"{key} is read nowhere"


def test_no_key_is_read_that_does_not_exist():
  config = base.get_config()
  groups = set(config.to_dict())
  known = set(identity.flat(config.to_dict())) | {"task.reward_weights"}
  known |= {"model.new"}
  for path, tree in sources():
    for node in ast.walk(tree):
      if not isinstance(node, ast.Attribute):
        continue
      text = ast.unparse(node)
      match = re.fullmatch(r"config\.(\w+)\.(\w+)", text)
      if match and match[1] in groups and match[2] != "to_dict":
        assert f"{match[1]}.{match[2]}" in known, f"{path.name}: {text}"


def test_every_key_has_a_meaning_and_every_number_a_range():
  unbounded = {"mesh.data", "mesh.fsdp", "mesh.tensor"}  # -1 is a value
  for name, field, value in keys.walk(schema.Config()):
    rules = field.metadata
    assert rules["meaning"], name
    bounded = rules["at_least"] is not None or rules["above"] is not None
    if type(value) in (int, float):
      assert bounded or name in unbounded, name
    if rules["choices"]:
      assert value in rules["choices"], name


def test_typed_and_plain_are_inverse():
  values = keys.plain(schema.Config())
  values["task"]["reward_weights"] = {"correct": 0.5}
  values["objective"]["spg"]["bound_mix"] = 0.25
  assert keys.plain(keys.typed(values, schema.Config)) == values
  assert base.get_config().to_dict() == keys.plain(schema.Config())


@pytest.mark.parametrize(
  ("key", "value", "said"),
  [
    ("run.steps", 0, "run.steps=0 must be at least 1."),
    ("eval.every", -1, "eval.every=-1 must not be negative."),
    ("optimizer.b1", 1.0, r"optimizer.b1=1.0 must lie in \[0, 1\)."),
    ("data.corrupt_share", 1.5, r"=1.5 must lie in \[0, 1\]."),
    ("objective.vrpo.beta", 0.0, "vrpo.beta=0.0 must be greater than 0."),
    ("objective.clip", float("nan"), "objective.clip=nan must be a finite"),
    ("run.seed", 2**32, "run.seed=4294967296 is too large"),
    ("objective.spg.negative_score", "mux", "did you mean 'mix'"),
  ],
)
def test_a_value_out_of_its_range_is_refused_by_name(key, value, said):
  values = keys.plain(schema.Config())
  *groups, name = key.split(".")
  group = values
  for part in groups:
    group = group[part]
  group[name] = value
  with pytest.raises(ValueError, match=said):
    keys.check_values(keys.typed(values, schema.Config))


@pytest.mark.parametrize(
  ("key", "meant"),
  [
    ("objective.bound_mix", {"objective.spg.bound_mix"}),
    ("objective.beta", {"objective.vrpo.beta", "objective.trafl.beta"}),
    ("objectiv.name", {"objective.name"}),
  ],
)
def test_a_key_in_the_wrong_group_is_told_every_group_that_has_it(key, meant):
  with pytest.raises(ValueError, match="not a key of the config") as caught:
    load.override(base.get_config(), key, "1")
  said = str(caught.value).partition("did you mean ")[2].partition("?")[0]
  assert set(said.split(" or ")) == {f"--config.{each}" for each in meant}


# Embedded checkpoints.


@pytest.mark.parametrize("name", ["countdown", "sudoku"])
def test_embedded_checkpoints_fit_their_config(name):
  config = config_of(name)
  built = settings.build(config, 1)
  folder = pathlib.Path(built.model_folder)
  assert sum(path.stat().st_size for path in folder.iterdir()) <= 2**20
  model = rspo_jax.load_model(folder)
  task = TASKS[name]
  generator = __import__(
    f"rspo_jax.datasets.{name}", fromlist=["generate"]
  ).generate
  columns = generator(0, "validation", 50).columns()
  for i in range(50):
    row = {key: value[i] for key, value in columns.items()}
    if name == "countdown":
      example = {
        "ground_truth": [list(map(int, row["numbers"])), int(row["target"])],
        "solution": _text(row["solution"]),
      }
    else:
      example = {
        "puzzle": _text(row["puzzle"]),
        "ground_truth": _text(row["solution"]),
      }
    prompt = task.prompt(example, built.task.prompt_style)
    answer = task.demonstration(example)
    for text, budget in (
      (prompt, built.data.prompt_length),
      (answer, built.sampler.completion_length),
    ):
      ids = model.tokenizer.encode(text)
      assert len(ids) <= budget
      assert model.tokenizer.decode(ids) == text
    assert task.verify(example, answer).correct
  longest = built.data.prompt_length + built.sampler.completion_length
  assert longest <= model.config.max_length


def _text(value):
  return value.decode() if isinstance(value, bytes) else str(value)


# Large models.


@pytest.mark.parametrize("name", ["countdown", "sudoku", *REAL])
@pytest.mark.parametrize("model", ["llada_8b", "dream_7b"])
def test_large_models_are_adapted_and_with_full_trained_whole(name, model):
  adapted = config_of(name, model)
  assert adapted.model.published == model and adapted.lora.rank == 64
  assert adapted.lora.targets == ",".join(lora.PROJECTIONS)
  assert adapted.objective.lambda_unit == "sequence"
  whole = config_of(name, f"{model},full")
  assert whole.lora.rank == 0
  assert whole.model.param_dtype == whole.optimizer.moment_dtype == "bfloat16"
  for config in (adapted, whole):
    built = settings.build(config, 4, planning=True)
    assert (built.adapter is None) == (config is whole)
    assert built.model.remat and not built.model.path
  # Named but not there: the command says what is missing.
  with pytest.raises(ValueError, match=r"model\.path=''"):
    settings.build(adapted, 4)


@pytest.mark.parametrize("name", [name for name in FILES if "study" in name])
def test_runs_of_the_study_cost_the_same(name):
  from configs import study, study_countdown
  from rspo_jax.algorithm import objectives
  from rspo_jax.tools.sweep import entries as sweep_entries

  runs = {"study": study.SUDOKU, "study_countdown": study_countdown.COUNTDOWN}
  entries = sweep_entries.load_entries(str(ROOT / "configs" / f"{name}.py"))
  tuned, seeds = {}, set()
  for entry in entries:
    config = runs[name].config(entry.arg)
    config.update_from_flattened_dict(entry.overrides)
    built = settings.build(config, 1)
    objective = objectives.OBJECTIVES[built.objective.name]
    updates = built.step.updates_per_rollout
    each = 3 + objective.uses_reference(built.objective)
    each += objective.ratio and updates > 1
    each += built.objective.centring == "batch"
    rollout = built.sampler.steps * (1 + 0.5 * objective.finishes)
    cost = rollout + updates * built.likelihood.masks * each
    assert study.forwards(config) == cost, entry.name
    if entry.name != "final-rspo-spent":
      spent = cost * config.run.steps
      assert abs(spent - runs[name].budget) <= cost / 2, entry.name
    if entry.name.startswith("tune-"):
      run, _, rate = entry.name.removeprefix("tune-").rpartition("-")
      assert float(rate) == entry.overrides["optimizer.learning_rate"]
      tuned.setdefault(run, set()).add(float(rate))
      seeds |= set(entry.seeds)
  assert all(len(rates) == 3 for rates in tuned.values())
  names = {entry.name for entry in entries}
  assert all(any(f"final-{run}" in other for other in names) for run in tuned)
  for entry in entries:
    if entry.name.startswith("final-"):
      assert tuple(entry.seeds) == runs[name].seeds
      assert len(entry.seeds) >= 3 and not seeds & set(entry.seeds)
      assert entry.overrides["eval.split"] == "test"


def test_only_a_key_that_is_empty_by_default_may_name_nothing():
  values = keys.plain(schema.Config())
  keys.check_names(keys.typed(values, schema.Config))  # model.published is ""
  values["objective"]["name"] = ""
  with pytest.raises(ValueError, match=r"objective\.name='' is not known"):
    keys.check_names(keys.typed(values, schema.Config))
