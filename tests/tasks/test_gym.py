"""reasoning-gym's generators as tasks."""

import importlib.util
import json
import pathlib
import random
import re

import pytest

from rspo_jax import main
from rspo_jax.config import schema
from rspo_jax.devices import workers
from rspo_jax.tasks import base, find, gym, own

HERE = importlib.util.find_spec("reasoning_gym") is not None
needs_gym = pytest.mark.skipif(
  not HERE, reason="needs reasoning-gym: pip install -r requirements-gym.txt"
)
SUMS = (
  "reasoning_gym:chain_sum,min_terms=2,max_terms=2,min_digits=1,max_digits=1"
)


@pytest.fixture
def few(monkeypatch, tmp_path):
  """Little data, kept in a folder of its own."""
  monkeypatch.setattr(gym, "ENTRIES", {"small": 64})
  gym._examples.cache_clear()
  yield schema.Data(dir=str(tmp_path))
  gym._examples.cache_clear()


@pytest.mark.parametrize(
  ("name", "generator", "options"),
  [
    ("reasoning_gym:mini_sudoku", "mini_sudoku", {}),
    ("reasoning_gym:gcd,max_numbers=2", "gcd", {"max_numbers": 2}),
    (
      'reasoning_gym:a,b=["+","-"],c=[1,2], d=x',
      "a",
      {"b": ["+", "-"], "c": [1, 2], "d": "x"},
    ),
  ],
)
def test_a_name_holds_a_generator_and_its_options(name, generator, options):
  found, text = gym.parse(name)
  assert found == generator and json.loads(text) == options


@pytest.mark.parametrize("name", ["reasoning_gym:", "reasoning_gym:a b,c"])
def test_a_name_that_is_none_is_refused(name):
  with pytest.raises(ValueError, match="reasoning_gym:mini_sudoku"):
    find(name)


@pytest.mark.parametrize(
  ("questions", "bare"),
  [
    (["What is 1 + 2 =", "What is 12 + 3 ="], ["1 + 2", "12 + 3"]),
    (["What is 12?", "What is 13?"], ["12", "13"]),
    (["What is 21?", "What is 31?"], ["21", "31"]),
    (["Is it so?", "Is it so?"], ["Is it so?", "Is it so?"]),
    (["a", "b"], ["a", "b"]),
    (["go", "go on"], ["go", "go on"]),
  ],
)
def test_a_compact_prompt_is_what_tells_questions_apart(questions, bare):
  start, end = gym.shared_ends(questions)
  found = [q[start : len(q) - end].strip(" =") for q in questions]
  assert found == bare


@pytest.mark.parametrize(
  ("text", "answer"),
  [
    (" 7\n", "7"),
    ("so <answer> 7 </answer> or <answer>8</answer>.", "8"),
    ("<answer>7", ""),
    ("", ""),
  ],
)
def test_the_answer_is_the_last_tag_or_the_whole(text, answer):
  assert gym.final_answer(text) == answer


@pytest.mark.parametrize(
  ("outcome", "score"),
  [
    (workers.Outcome([1.0, ""]), 1.0),
    (workers.Outcome([0.25, ""]), 0.25),
    (workers.Outcome([1.5, ""]), 1.0),
    (workers.Outcome([-1.0, ""]), 0.0),
    (workers.Outcome([float("nan"), ""]), 0.0),
    (workers.Outcome([0.0, "ValueError: x"]), 0.0),
    (workers.Outcome(None, "took longer than 5 s"), 0.0),
  ],
)
def test_a_score_is_a_share_whatever_the_scorer_says(outcome, score):
  correct, parts, reason = gym._finding("7", outcome)
  assert parts == {"score": score, "format": 1.0}
  assert correct == (score == 1.0)
  assert (base.NO_VERDICT in reason) == bool(outcome.reason)


@needs_gym
class TestData:
  def test_splits_share_no_question_and_are_the_same_each_time(self, few):
    task = find(SUMS)
    splits = {split: task.load(split, few) for split in base.SPLITS}
    prompts = {
      split: [example["prompt"] for example in examples]
      for split, examples in splits.items()
    }
    for split in ("validation", "test"):
      assert len(set(prompts[split])) == len(prompts[split]) > 0
    assert not set(prompts["train"]) & set(prompts["validation"])
    assert not set(prompts["train"]) & set(prompts["test"])
    assert not set(prompts["validation"]) & set(prompts["test"])
    # From the file that keeps them, and made again once that is damaged.
    (kept,) = (pathlib.Path(few.dir) / "reasoning_gym").rglob("*.jsonl")
    for damage in (lambda text: text, lambda text: text[:-20]):
      kept.write_text(damage(kept.read_text()))
      gym._examples.cache_clear()
      assert {split: task.load(split, few) for split in base.SPLITS} == splits

  def test_an_example_has_prompt_answer_and_its_score(self, few):
    task = find(SUMS)
    example = task.load("train", few)[0]
    left, operator, right = task.prompt(example, "compact").rstrip(" =").split()
    total = int(left) + int(right) * (1 if operator == "+" else -1)
    assert task.demonstration(example) == str(total)
    foils = [task.corrupt(each, None) for each in task.load("train", few)]
    golds = [each["ground_truth"] for each in task.load("train", few)]
    assert set(foils) - {foils[0]} <= {
      each["ground_truth"]
      for split in base.SPLITS
      for each in task.load(split, few)
    }
    right = sum(f == g for f, g in zip(foils, golds, strict=True))
    assert right < len(golds) / 2
    assert example["prompt"].startswith("State the final answer")
    assert task.prompt(example, "d1").endswith(example["prompt"])
    texts = [str(total), f"it is <answer>{total}</answer>", str(total + 1), ""]
    judged = task.judge([(example, text) for text in texts])
    assert [verdict.correct for verdict in judged] == [True, True, False, False]
    assert judged[0].reward == 1.0 and judged[3].parts["format"] == 0.0
    assert task.verify(example, texts[0], weights={"score": 0.5}).reward == 0.5

  @pytest.mark.parametrize(
    ("name", "said"),
    [
      ("reasoning_gym:mini_sudoko", "mini_sudoku"),
      ("reasoning_gym:composite", "no such generator"),
      ("reasoning_gym:chain_sum,max_term=2", "max_terms"),
      ("reasoning_gym:chain_sum,min_terms=9", "refused"),
    ],
  )
  def test_mistakes_in_the_name_are_told_when_data_is_loaded(
    self, few, name, said
  ):
    with pytest.raises(ValueError, match=said):
      find(name).load("train", few)

  def test_an_entry_that_is_made_differently_is_not_scored(self, few):
    task = find(SUMS)
    example = dict(task.load("train", few)[0], prompt="What is 1 + 1?")
    verdict = task.verify(example, "2")
    assert not verdict.correct and "another entry" in verdict.reason

  def test_other_sources_and_sizes_are_refused(self, few):
    for changes, said in (
      ({"source": "a.jsonl"}, "makes its own data"),
      ({"size": "huge"}, "'huge'"),
    ):
      with pytest.raises(ValueError, match=said):
        find(SUMS).load("train", schema.Data(**changes))


def test_without_the_package_the_remedy_is_named(monkeypatch, few):
  monkeypatch.setattr(gym, "_TARGET", "no_such_package.generators:call")
  with pytest.raises(ValueError, match=r"requirements-gym\.txt"):
    find(SUMS).load("train", few)


def answers_to(example, rng, count):
  """Right, damaged, foreign and senseless answers to an example."""
  gold = example["ground_truth"] or "[[1, 2], [3]]"
  found = [gold, "", "0", "yes", "[[", "None", "9" * 400, "(" * 200, "\x00é٣"]
  while len(found) < count:
    letters = list(gold)
    for _ in range(rng.randrange(1, 4)):
      letters[rng.randrange(len(letters))] = rng.choice(
        "0123456789 abc[](),-\n"
      )
    found.append("".join(letters)[: rng.randrange(1, 2 * len(letters))])
  return found[:count]


def check_generator(name, size, count, data_dir):
  """Scores `count` answers of a generator; each gets a verdict."""
  limits = workers.Limits(time_s=5.0)
  task = gym.make_task(
    f"reasoning_gym:{name}", own.RewardSettings(limits=limits)
  )
  examples = gym._examples(name, "{}", 0, size, data_dir, 2)
  examples = [example for split in base.SPLITS for example in examples[split]]
  rng = random.Random(name)
  pairs = [
    (example, answer)
    for example in examples
    for answer in answers_to(example, rng, -(-count // len(examples)))
  ][:count]
  judged = task.judge(pairs)
  # Some scorers compute what an answer asks for, at any length.
  failed = [
    v.reason
    for v in judged
    if base.NO_VERDICT in v.reason and "took longer" not in v.reason
  ]
  for (example, answer), verdict in zip(pairs, judged, strict=True):
    assert 0.0 <= verdict.reward <= 1.0
    if answer == example["ground_truth"] and "longer" not in verdict.reason:
      assert verdict.reward > 0.5, (name, answer)
  return failed


def generator_names():
  """Every generator, [] without the package."""
  if not HERE:
    return []
  from rspo_jax.tasks import generators

  return generators.names()


@needs_gym
@pytest.mark.parametrize("name", ["mini_sudoku", "leg_counting", "gcd"])
def test_answers_of_a_generator_are_scored(name, tmp_path):
  assert check_generator(name, 4, 20, str(tmp_path)) == []


@needs_gym
@pytest.mark.slow
@pytest.mark.parametrize("name", generator_names())
def test_100_answers_of_every_generator_are_scored(name, tmp_path):
  assert len(generator_names()) >= 100
  assert check_generator(name, 8, 100, str(tmp_path)) == []


@needs_gym
@pytest.mark.slow
def test_a_generator_is_imitated_and_trained_on(few, tmp_path, quick_runs):
  root = pathlib.Path(__file__).resolve().parents[2]
  values = {
    "task.name": "reasoning_gym:spiral_matrix,min_n=2,max_n=2",
    "data.dir": few.dir,
    "data.prompt_length": 8,
    "data.corrupt_share": 0.5,
    "model.new.vocabulary": r"0 1 2 3 4 5 6 7 8 9 \s",
    "model.new.pattern": ".",
    "model.new.width": 32,
    "model.new.heads": 2,
    "model.new.kv_heads": 2,
    "run.compilation_cache": "",
  }

  def run(config, folder, **changes):
    keys = values | {k.replace("__", "."): v for k, v in changes.items()}
    return main.main(
      [
        "rspo_jax",
        f"--config={root}/configs/{config}.py:smoke",
        f"--workdir={folder}",
        *(f"--config.{key}={value}" for key, value in keys.items()),
      ]
    )

  parent, folder = tmp_path / "parent", tmp_path / "run"
  assert run("sft_countdown", parent) == 0
  changes = {"model__path": parent / "model", "data__corrupt_share": 0.0}
  assert run("countdown", folder, run__steps=2, **changes) == 0
  for path in (folder / "samples").glob("*.jsonl"):
    for line in path.open():
      row = json.loads(line)
      assert re.fullmatch(r"\d \d \d \d", row["prompt"])
      assert row["verdict"]["parts"].keys() == {"score", "format"}
      assert base.NO_VERDICT not in row["verdict"]["reason"]
