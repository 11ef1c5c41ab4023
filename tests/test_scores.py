"""Tables of evaluations, and the files of one in d1's layout."""

import json

import pytest

from rspo_jax import sampler, scores
from rspo_jax.tasks import TASKS


def evaluation(**changes):
  """An evaluation as --mode=eval writes it."""
  return {
    "task": "sudoku",
    "model": "embedded:sudoku",
    "step": 0,
    "split": "test",
    "protocol": "strict",
    "completion_length": 16,
    "sampler": "llada",
    "seed": 0,
    "temperature": 1.0,
    "eval/n": 100,
    "eval/accuracy": 0.5,
    "eval/ci_low": 0.404,
    "eval/ci_high": 0.596,
    "eval/accuracy_sampled": 0.25,
    "eval/ci_low_sampled": 0.176,
    "eval/ci_high_sampled": 0.343,
    "eval/reward": 0.75,
    "eval/reward_sampled": 0.5,
    "eval/denoiser_calls": 16.0,
    "eval/denoiser_calls_sampled": 16.0,
  } | changes


def test_a_table_shows_what_differs_and_leaves_the_rest_out():
  rows = [
    evaluation(),
    evaluation(
      sampler="entropy", **{"eval/pass_at_1": 0.25, "eval/pass_at_4": 0.6}
    ),
  ]
  cells = scores.table(rows)
  assert list(cells[0]) == [
    "length", "sampler", "n", "greedy", "greedy, 95 %", "sampled",
    "sampled, 95 %", "pass@4", "forwards", "tokens/s",
  ]  # fmt: skip
  assert cells[0]["greedy"] == "50.0 %" and cells[0]["pass@4"] == ""
  assert cells[1]["greedy, 95 %"] == "40.4 to 59.6"
  assert cells[1]["pass@4"] == "60.0 %"
  text = scores.markdown(cells).splitlines()
  assert len(text) == 4 and len({line.count("|") for line in text}) == 1


def test_evaluations_are_read_from_folders_in_order(tmp_path, capsys):
  for name, length in (("b", 512), ("a", 128), ("c", 256)):
    folder = tmp_path / name / "eval"
    folder.mkdir(parents=True)
    row = evaluation(completion_length=length)
    (folder / "x.json").write_text(json.dumps(row))
    (folder / "x-greedy.jsonl").write_text("{}\n")
  folders = [str(tmp_path / name) for name in "abc"]
  rows = scores.read([*folders[:2], tmp_path / "c" / "eval"])
  assert [row["completion_length"] for row in rows] == [128, 256, 512]
  assert scores.main(folders) == 0
  assert capsys.readouterr().out.count("\n") == 5


@pytest.mark.parametrize(
  ("content", "said"),
  [
    (None, "--mode=eval"),
    ("{", "cannot be read"),
    ("[]", "no evaluation"),
    ('{"generations": []}', "no evaluation"),
  ],
)
def test_folders_without_evaluations_are_named(tmp_path, capsys, content, said):
  if content is not None:
    (tmp_path / "a.json").write_text(content)
  assert scores.main([str(tmp_path)]) == 2
  captured = capsys.readouterr()
  assert captured.out == "" and said in captured.err
  assert str(tmp_path) in captured.err


def test_a_run_that_was_not_evaluated_is_no_evaluation(tmp_path, capsys):
  folder = tmp_path / "my run"
  folder.mkdir()
  (folder / "config.json").write_text("{}")
  (folder / "metrics.jsonl").write_text("{}\n")
  assert scores.main([str(folder)]) == 2
  said = capsys.readouterr().err
  assert "holds no evaluation" in said and "remove" not in said
  assert f"--mode=eval '--workdir={folder}'" in said


def test_an_evaluation_goes_over_its_own_files_and_no_others(tmp_path):
  stem = tmp_path / "validation-8-step000000"
  line = {"model": "one", "temperature": 1.0}
  assert scores.free_stem(stem, line) == stem
  stem.with_name(f"{stem.name}.json").write_text(
    json.dumps(line | {"eval/accuracy": 0.5})
  )
  assert scores.free_stem(stem, line) == stem
  others = [
    scores.free_stem(stem, line | change)
    for change in ({"model": "two"}, {"temperature": 0.7})
  ]
  assert len({stem, *others}) == 3
  assert all(other.name.startswith(f"{stem.name}-") for other in others)


def test_a_sampler_is_named_by_what_it_changes():
  def name(**changes):
    return scores.sampler_name(sampler.SamplerSettings(32, 8, 16, **changes))

  assert name() == "llada"
  assert (
    name(temperature=1.0, algorithm="entropy", top_k=5) == "entropy+top_k=5"
  )
  assert name(cache="dual", threshold=0.9) == "llada+dual+threshold=0.9"
  assert name(remasking="random", cfg_scale=1.5) == "llada+random+cfg_scale=1.5"


def test_numbers_in_names_are_compared_as_numbers():
  names = ["10 empty", "9 empty", "7 or more", "6 steps"]
  assert sorted(names, key=scores.natural) == [
    "6 steps", "7 or more", "9 empty", "10 empty",
  ]  # fmt: skip


def test_d1_files_hold_what_the_recordings_of_d1_do(shared):
  settings = sampler.SamplerSettings(128, 32, 64)
  for task in TASKS:
    path = shared / f"fixtures/verifiers/{task}.jsonl"
    with open(path, encoding="utf-8") as file:
      rows = [json.loads(line) for line in file]
    rows = [row for row in rows if not row.get("synthetic")]
    name, document = scores.d1_document(
      task,
      rows,
      ["?"] * len(rows),
      [row["completion"] for row in rows],
      settings,
      "a model",
    )
    # As in countdown_instruct_128_64_0_generations.json.
    assert name == f"{task}_model_128_64_0_generations.json"
    assert (document["gen_length"], document["diffusion_steps"]) == (128, 64)
    for row, written in zip(rows, document["generations"], strict=True):
      if task in ("countdown", "sudoku"):
        # Made from the example, without looking at the recorded question.
        assert written["question"] == row["question"]
      assert written["ground_truth"] == row.get("ground_truth")
      assert written["generations"] == row["completion"]
