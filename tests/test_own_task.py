"""Tasks of the user's own: the documented example, scores of every kind."""

import dataclasses
import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from rspo_jax import data, main, rollout, run_config, tasks, workers
from rspo_jax.tasks import base, own
from rspo_jax.workers import Outcome

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def here(tmp_path, monkeypatch):
  """An empty folder, current and on Python's path, as for `python -m`."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(tmp_path))
  return tmp_path


def test_the_documented_example_runs(here):
  text = (ROOT / "docs/own_task.md").read_text("utf-8")
  program, commands = re.findall(r"```(?:python|bash)\n(.*?)```", text, re.S)
  name = re.match(r"# (\w+\.py)\n", program).group(1)
  (here / name).write_text(program)
  first, second = map(shlex.split, commands.strip().splitlines())
  subprocess.run([sys.executable, *first[1:]], check=True)

  assert second[:3] == ["python", "-m", "rspo_jax.main"]
  arguments = [a.replace("configs/", f"{ROOT}/configs/") for a in second[2:]]
  (here / "model").mkdir()
  (here / "model/config.json").write_text("{}")
  arguments.append("--config.model.path=model")
  config, *_ = main.parse(arguments)
  from rspo_jax import settings

  built = settings.build(config, 1)
  task = tasks.find(built.task["name"], built.task["reward"])
  for split in base.SPLITS:
    assert len(data.load_examples(task, split, built.data)) == 1000
  examples = data.load_examples(task, "test", built.data)[:2]
  a, b = (example["answer"] for example in examples)
  judged = rollout.judge(task, examples, [a, "", a + a, b], "strict", None)
  assert judged.rewards.tolist() == [1.0, 0.0, 0.0, 1.0]
  assert judged.correct.tolist() == [True, False, False, True]
  assert not judged.unjudged.any()
  # The tiny model can spell the prompts: a,b,c=d.
  assert all(
    re.fullmatch(r"\d+,\d+,\d+=\d+", task.prompt(e, "compact"))
    for e in examples
  )


def test_functions_that_fail_cost_their_completion_its_reward(here):
  (here / "hard.py").write_text(
    "import os, time\n"
    "def score(row, completion):\n"
    "  if completion == 'hang': time.sleep(300)\n"
    "  if completion == 'crash': os._exit(1)\n"
    "  if completion == 'raise': raise ValueError(row['why'])\n"
    "  return len(completion)\n"
  )
  row = {"prompt": "p", "why": "because"}
  (here / "rows.jsonl").write_text(json.dumps(row) + "\n")
  limits = workers.Limits(time_s=0.5)
  task = tasks.find("hard:score", own.RewardSettings(limits=limits))
  source = base.DataSettings(source="rows.jsonl")
  examples = data.load_examples(task, "test", source)
  assert examples == [row]
  texts = ["hang", "ab", "crash", "raise", ""]
  judged = rollout.judge(task, examples, texts, "strict", {"reward": 2.0})
  assert judged.rewards.tolist() == [0.0, 4.0, 0.0, 0.0, 0.0]
  assert judged.correct.tolist() == [False, True, False, False, False]
  assert judged.unjudged.tolist() == [True, False, True, True, False]
  assert [verdict.reason for verdict in judged.verdicts] == [
    "no verdict: took longer than 0.5 s",
    "scored 2",
    "no verdict: the worker ended with status 1",
    "no verdict: ValueError: because",
    "scored 0",
  ]


def test_an_extra_reward_is_added_to_a_task(here):
  (here / "brief.py").write_text(
    "def score(row, completion):\n"
    "  return -0.25 * len(completion) / row['ground_truth'][1]\n"
  )
  task = tasks.find("countdown", own.RewardSettings(extra="brief:score"))
  example = {"ground_truth": [[3, 4, 5], 5]}
  for weights, reward in (
    (None, 0.9 * 0 + 0.1 - 0.25),
    ({"extra": 2.0}, 0.1 - 0.5),
    ({"extra": 0.0, "numbers": 0.5}, 0.5),
  ):
    (verdict,) = task.judge([(example, "3+4+5")], weights=weights)
    assert verdict.reward == pytest.approx(reward) and not verdict.correct
    assert verdict.parts == {"correct": 0, "numbers": 1, "extra": -0.25}
  assert set(task.weights) == {"correct", "numbers", "extra"}


@pytest.mark.parametrize(
  ("value", "reward", "correct"),
  [
    (1, 1.0, True),
    (0.5, 0.5, False),
    (True, 1.0, True),
    (False, 0.0, False),
    (-3, -3.0, False),
    ({"reward": 0.2, "correct": True}, 0.2, True),
    ({"reward": 1, "correct": False, "parts": {"a": 1}}, 1.0, False),
  ],
)
def test_scores(value, reward, correct):
  verdict = own.verdict(Outcome(value))
  assert (verdict.reward, verdict.correct) == (reward, correct)
  assert verdict.parts["reward"] == reward
  assert not verdict.reason.startswith(base.NO_VERDICT)


@pytest.mark.parametrize(
  "value",
  [
    None, "1", [], {}, float("nan"), float("inf"), 10**400,
    {"reward": "1"}, {"reward": 1, "parts": [1]},
    {"reward": 1, "parts": {"a": "b"}}, {"reward": 1, "parts": {"a": None}},
    {"reward": 1, "parts": {str(i): 1 for i in range(100)}},
  ],
)  # fmt: skip
def test_what_is_no_score(value):
  verdict = own.verdict(Outcome(value))
  assert verdict.reward == 0.0 and not verdict.correct
  assert verdict.reason.startswith(base.NO_VERDICT)


def test_a_reason_can_be_written_to_a_file():
  verdict = own.verdict(Outcome({"reward": 1, "reason": "\ud800" * 1000}))
  assert len(verdict.reason.encode("utf-8")) <= 1000


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("nowhere:score", {}, r"nowhere:score cannot be imported"),
    ("json:absent", {}, r"json:absent cannot be imported"),
    ("json:loads", {"source": ""}, r"json:loads needs data.source=PATH"),
    ("json:loads", {"source": "empty.jsonl"}, r"empty.jsonl holds no rows"),
    ("json:loads", {"source": "bad.jsonl"}, r"bad.jsonl:2: expected a field"),
    ("json:loads", {"source": "worse.jsonl"}, r"worse.jsonl:1: expected text"),
  ],
)
def test_mistakes_are_told_before_anything_is_trained(
  here, name, options, message
):
  (here / "rows.jsonl").write_text('{"prompt": "p"}\n')
  (here / "empty.jsonl").write_text("")
  (here / "bad.jsonl").write_text('{"prompt": "p"}\n{"text": "p"}\n')
  (here / "worse.jsonl").write_text('{"prompt": 7}\n')
  settings = base.DataSettings(**{"source": "rows.jsonl"} | options)
  with pytest.raises(data.DataError, match=message):
    data.load_examples(tasks.find(name), "test", settings)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("gsm", r"task.name='gsm' is not known; did you mean 'gsm8k'"),
    ("", r"task.name='' is not known; choose from countdown, gsm8k"),
    ("my rewards:score", r"must be module:function"),
    ("a:b:c", r"must be module:function"),
  ],
)
def test_names_of_no_task(name, message):
  with pytest.raises(ValueError, match=message):
    tasks.find(name)


def test_demonstrations_come_from_the_rows():
  task = tasks.find("json:loads")
  assert task.demonstration({"prompt": "p", "demonstration": "d"}) == "d"
  with pytest.raises(ValueError, match="'p' has no text 'demonstration'"):
    task.demonstration({"prompt": "p"})


PROMPTED = {
  "countdown": ({"ground_truth": [[3, 4, 5], 23]}, ["[3, 4, 5]", "23"]),
  "sudoku": ({"puzzle": "0310200404001043"}, ["0310200404001043"]),
  "gsm8k": ({"question": "How many?"}, ["How many?"]),
  "math500": ({"question": "How much?"}, ["How much?", "\\boxed{"]),
  "json:loads": ({"prompt": "Why?"}, ["Why?"]),
}


class TestPrompts:
  @pytest.mark.parametrize("name", sorted(PROMPTED))
  def test_formats_ask_for_what_verifiers_read(self, name):
    task = tasks.find(name)
    example, contents = PROMPTED[name]
    for style in ("d1", "espo"):
      text = task.prompt(example, style)
      assert all(part in text for part in contents), text
    tags = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
    text = task.prompt(example, "d1")
    places = [text.index(tag) for tag in tags]
    assert places == sorted(places)
    if name in ("gsm8k", "math500"):
      text = task.prompt(example, "espo")
      assert "\\boxed{}" in text and "<answer>" not in text

  def test_the_worked_sudoku_is_right(self):
    text = tasks.TASKS["sudoku"].prompt({"puzzle": "0" * 16}, "espo")
    puzzle, solution = re.findall(r"\b[0-4]{16}\b", text)[:2]
    example = {"puzzle": puzzle, "ground_truth": solution}
    assert tasks.TASKS["sudoku"].verify(example, solution).correct

  def test_all_but_compact_prompts_go_through_the_chat_template(self):
    from rspo_jax import tokenizer

    plain = tokenizer.build_word_tokenizer(["a"], ".")
    template = (
      "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
      "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = dataclasses.replace(plain, template=template)
    task, row = tasks.find("json:loads"), {"prompt": "Why?"}
    assert data.prompt_text(task, row, "compact", chat) == "Why?"
    with pytest.raises(data.DataError, match="chat_template"):
      data.prompt_text(task, row, "chat", plain)
    empty = dataclasses.replace(plain, template="{{ messages[0].text }} ")
    with pytest.raises(data.DataError, match="makes nothing of 'Why"):
      data.prompt_text(task, row, "chat", empty)
    bare = data.prompt_text(task, row, "d1", plain)
    assert bare == task.prompt(row, "d1")
    found = data.prompt_text(task, row, "chat", chat)
    assert found == "<user>Why?<assistant>"
    found = data.prompt_text(task, row, "d1", chat)
    assert found == f"<user>{task.prompt(row, 'd1')}<assistant>"


@pytest.mark.parametrize("name", ["gsm8k", "math500"])
def test_configs_of_real_models_say_what_they_need(name, tmp_path, shared):
  from rspo_jax import settings

  file = f"--config={ROOT}/configs/{name}.py"
  config, *_ = main.parse(["", file])
  with pytest.raises(ValueError, match=r"--config.model.path=FOLDER"):
    settings.build(config, 1)
  (tmp_path / "config.json").write_text("{}")
  for argument in ("", ":smoke", ":paper_literal,d1", ":rft", ":calibrated"):
    arguments = [f"{file}{argument}", f"--config.model.path={tmp_path}"]
    built = settings.build(main.parse(["", *arguments])[0], 1)
    assert built.task["name"] == name
  assert built.sampler.completion_length == 256
  source = shared / "data/gsm8k_{split}.jsonl"
  arguments += [f"--config.data.source={source}", "--config.eval.split=test"]
  settings.build(main.parse(["", *arguments])[0], 1)
  with pytest.raises(ValueError, match=r"gsm8k_validation.jsonl' is not a"):
    settings.build(main.parse(["", *arguments[:-1]])[0], 1)


def test_a_run_begun_before_a_key_existed_goes_on():

  config, *_ = main.parse(["", f"--config={ROOT}/configs/countdown.py"])
  new = config.to_dict()
  old = {group: keys for group, keys in new.items() if group != "reward"}
  run_config.check_same_run(old, new, "DIR")
  new["reward"] = new["reward"] | {"extra": "sums:score"}
  with pytest.raises(ValueError, match=r"reward\.extra='sums:score'"):
    run_config.check_same_run(old, new, "DIR")
