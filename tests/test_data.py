"""Batches as a function of (seed, step), whatever the number of processes."""

import contextlib
import time

import numpy as np
import pytest

from rspo_jax import data
from rspo_jax.tasks import TASKS, base

PAD, EOS = 98, 99


def encode(text):
  """Characters as ids; a capital letter is not in the vocabulary."""
  if text != text.lower():
    raise ValueError(f"no token for {text!r}")
  return [ord(c) - 32 for c in text]


def decode(ids):
  return "".join(chr(i + 32) for i in ids)


def examples_of(count):
  return [
    {"ground_truth": [[i, i + 1, i + 2], 3 * i + 3],
     "solution": f"{i}+{i + 1}+{i + 2}"}
    for i in range(1, count + 1)
  ]  # fmt: skip


def prompt(example):
  return TASKS["countdown"].prompt(example, "compact")


def prompts_of(count=20, size=6, seed=0, **options):
  options = {"prompt_length": 16, "pad_id": PAD} | options
  return data.prompt_batches(
    examples_of(count), prompt, encode, size, seed, **options
  )


def demonstrations_of(count=20, size=6, seed=0, **options):
  options = {
    "prompt_length": 16,
    "completion_length": 14,
    "pad_id": PAD,
    "eos_id": EOS,
  } | options
  return data.demonstration_batches(
    examples_of(count),
    TASKS["countdown"],
    prompt,
    encode,
    size,
    seed,
    **options,
  )


class TestPromptBatches:
  def test_rows_are_left_padded_prompts_of_their_examples(self):
    batch = prompts_of()[0]
    assert batch.tokens.shape == batch.mask.shape == (6, 16)
    assert batch.tokens.dtype == np.int32 and batch.mask.dtype == bool
    for tokens, mask, example in zip(
      batch.tokens, batch.mask, batch.examples, strict=True
    ):
      text = prompt(example)
      assert decode(tokens[mask]) == text
      assert mask.tolist() == [False] * (16 - len(text)) + [True] * len(text)
      assert (tokens[~mask] == PAD).all()

  def test_a_step_gives_the_same_batch_whatever_was_read_before(self):
    used, fresh = prompts_of(), prompts_of()
    for step in range(9):
      used[step]
    np.testing.assert_array_equal(used[4].tokens, fresh[4].tokens)
    assert used[4].examples == fresh[4].examples

  def test_iterating_from_a_step_continues_the_run(self):
    whole = iter(prompts_of())
    rest = iter(prompts_of(start_step=3))
    for _ in range(3):
      next(whole)
    for _ in range(5):
      np.testing.assert_array_equal(next(whole).tokens, next(rest).tokens)

  def test_another_seed_gives_another_order(self):
    first, second = prompts_of(seed=0)[0], prompts_of(seed=1)[0]
    assert (first.tokens != second.tokens).any()

  def test_each_epoch_reads_every_example_once_in_another_order(self):
    batches = prompts_of(count=18, size=6)
    epochs = [
      [
        e["ground_truth"][1]
        for s in range(3)
        for e in batches[3 * k + s].examples
      ]
      for k in range(3)
    ]
    for epoch in epochs:
      assert sorted(epoch) == sorted({3 * i + 3 for i in range(1, 19)})
    assert epochs[0] != epochs[1] != epochs[2]

  def test_without_shuffling_the_order_is_that_of_the_examples(self):
    batches = prompts_of(count=6, size=6, shuffle=False)
    assert batches[0].examples == batches[1].examples == examples_of(6)

  @pytest.mark.parametrize("rows", [[0, 1, 2], [5], [1, 4], [0, 1, 2, 3, 4, 5]])
  def test_a_process_has_its_rows_of_the_global_batch(self, rows):
    whole, part = prompts_of(), prompts_of(rows=np.array(rows))
    for step in (0, 7):
      tokens = whole[step].tokens[rows]
      np.testing.assert_array_equal(part[step].tokens, tokens)
      assert part[step].examples == [whole[step].examples[i] for i in rows]

  def test_more_examples_than_are_checked_in_advance(self, monkeypatch):
    monkeypatch.setattr(data, "_CHECKED_PROMPTS", 5)
    few, all_ = prompts_of(), None
    monkeypatch.setattr(data, "_CHECKED_PROMPTS", 1000)
    all_ = prompts_of()
    for step in range(8):
      np.testing.assert_array_equal(few[step].tokens, all_[step].tokens)
      np.testing.assert_array_equal(few[step].mask, all_[step].mask)

  @pytest.mark.parametrize("checked", [5, 1000])
  def test_a_prompt_over_budget_is_found_before_the_first_batch(
    self, monkeypatch, checked
  ):
    monkeypatch.setattr(data, "_CHECKED_PROMPTS", checked)
    # 18,19,20=57 is the longest, with 11 characters.
    prompts_of(count=18, prompt_length=11)
    with pytest.raises(
      data.DataError, match=r"data.prompt_length=10.*least 11"
    ):
      prompts_of(count=18, prompt_length=10)

  def test_the_longest_are_found_without_making_every_prompt(self, monkeypatch):
    monkeypatch.setattr(data, "_CHECKED_PROMPTS", 5)
    made = []

    def through_a_template(example):
      made.append(example)
      return f"<{prompt(example)}>"

    data.Prompts(
      examples_of(18), through_a_template, encode, 13, PAD, user_text=prompt
    )
    assert len(made) == 5
    with pytest.raises(data.DataError, match="least 13"):
      data.Prompts(
        examples_of(18), through_a_template, encode, 12, PAD, user_text=prompt
      )

  @pytest.mark.parametrize("checked", [5, 1000])
  def test_the_tail_of_a_long_prompt_is_kept_and_counted(
    self, monkeypatch, checked
  ):
    monkeypatch.setattr(data, "_CHECKED_PROMPTS", checked)
    examples = examples_of(18)
    tokens, mask, cut = data.encode_prompts(
      examples, prompt, encode, 10, PAD, "keep_tail"
    )
    texts = [prompt(e) for e in examples]
    assert [decode(t[m]) for t, m in zip(tokens, mask, strict=True)] == [
      text[-10:] for text in texts
    ]
    assert cut.tolist() == [len(text) > 10 for text in texts] and cut.any()
    batch = prompts_of(count=18, prompt_length=10, long_prompts="keep_tail")[0]
    wanted = [len(prompt(e)) > 10 for e in batch.examples]
    assert batch.cut.tolist() == wanted

  def test_a_prompt_that_cannot_be_encoded_is_named(self):
    with pytest.raises(data.DataError, match=r"prompt 0, 'A'.*no token"):
      data.encode_prompts([{}], lambda example: "A", encode, 4, PAD)

  @pytest.mark.parametrize(
    ("options", "message"),
    [
      ({"size": 0}, r"batch size 0"),
      ({"rows": [0, 6]}, r"row 6 must be in 0\.\.5"),
      ({"rows": [-1]}, r"row -1"),
      ({"seed": -1}, r"seed -1"),
    ],
  )
  def test_impossible_placements_are_refused(self, options, message):
    with pytest.raises(data.DataError, match=message):
      prompts_of(**options)

  def test_a_negative_step_is_refused(self):
    with pytest.raises(IndexError):
      prompts_of()[-1]

  def test_encode_prompts_keeps_the_order(self):
    examples = examples_of(7)
    tokens, mask, cut = data.encode_prompts(examples, prompt, encode, 16, PAD)
    assert not cut.any()
    texts = [decode(t[m]) for t, m in zip(tokens, mask, strict=True)]
    assert texts == [prompt(e) for e in examples]


class TestDemonstrationBatches:
  def test_completions_are_the_solutions_filled_with_eos(self):
    batch = demonstrations_of()[0]
    assert batch.completion.shape == (6, 14) and not batch.corrupt.any()
    for tokens, mask, completion in zip(
      batch.tokens, batch.mask, batch.completion, strict=True
    ):
      a, b, c = decode(tokens[mask]).partition("=")[0].split(",")
      text = f"{a}+{b}+{c}"
      assert decode(completion[: len(text)]) == text
      assert (completion[len(text) :] == EOS).all()

  def test_the_share_of_corrupt_ones_is_that_asked_for(self):
    batches = demonstrations_of(size=100, corrupt_share=0.3)
    share = np.mean([batches[step].corrupt for step in range(20)])
    # Standard error of 2,000 draws is 0.0102.
    assert abs(share - 0.3) < 0.05

  def test_corruption_differs_between_epochs_and_repeats_with_the_seed(self):
    batches = demonstrations_of(count=6, corrupt_share=0.5, shuffle=False)
    again = demonstrations_of(count=6, corrupt_share=0.5, shuffle=False)
    other = demonstrations_of(count=6, corrupt_share=0.5, shuffle=False, seed=1)
    epochs = [batches[step].completion for step in range(6)]
    assert any((epoch != epochs[0]).any() for epoch in epochs[1:])
    for step in (5, 0, 3):
      np.testing.assert_array_equal(epochs[step], again[step].completion)
    assert any((other[s].completion != epochs[s]).any() for s in range(6))

  @pytest.mark.parametrize("rows", [[0, 1, 2], [5], [1, 4]])
  def test_a_process_has_its_rows_of_the_global_batch(self, rows):
    whole = demonstrations_of(corrupt_share=0.5)
    part = demonstrations_of(corrupt_share=0.5, rows=np.array(rows))
    for step in (0, 7):
      for field in ("tokens", "completion", "corrupt"):
        expected = getattr(whole[step], field)[rows]
        np.testing.assert_array_equal(getattr(part[step], field), expected)

  def test_all_or_none_may_be_corrupt(self):
    assert demonstrations_of(corrupt_share=1.0)[0].corrupt.all()
    assert not demonstrations_of(corrupt_share=0.0)[0].corrupt.any()

  def test_a_demonstration_over_budget_is_named(self):
    with pytest.raises(data.DataError, match=r"completion_length=4"):
      demonstrations_of(completion_length=4)[0]

  def test_a_share_outside_0_to_1_is_refused(self):
    with pytest.raises(data.DataError, match=r"corrupt_share=1.5"):
      demonstrations_of(corrupt_share=1.5)

  def test_a_batch_of_128_is_made_in_a_tenth_of_a_training_step(self):
    import time

    batches = demonstrations_of(count=5000, size=128, corrupt_share=0.65,
                                prompt_length=24, completion_length=24)  # fmt: skip
    times = []
    for step in range(20):
      started = time.process_time()
      batches[step]
      times.append(time.process_time() - started)
    # A step of the smallest supervised run takes 60 ms.
    assert min(times) < 0.012


class TestLoadExamples:
  def test_mistakes_become_data_errors(self, tmp_path):
    task = TASKS["countdown"]
    with pytest.raises(data.DataError, match="split='dev'"):
      data.load_examples(task, "dev", base.DataSettings())
    settings = base.DataSettings(source=str(tmp_path / "missing.jsonl"))
    with pytest.raises(data.DataError, match=r"missing\.jsonl does not exist"):
      data.load_examples(task, "test", settings)

  @pytest.mark.parametrize("name", ["countdown", "sudoku"])
  def test_generated_splits_are_random_access(
    self, name, tmp_path, monkeypatch
  ):
    builders = pytest.importorskip("rspo_jax.datasets.builders")
    monkeypatch.setattr(builders, "TRAIN_EXAMPLES", {"small": 40})
    monkeypatch.setattr(builders, "HELD_OUT_EXAMPLES", 20)
    task = TASKS[name]
    settings = base.DataSettings(data_dir=str(tmp_path))
    examples = data.load_examples(task, "train", settings)
    assert len(examples) == 40
    assert examples[3:5] == [examples[3], examples[4]]
    for example in examples:
      assert task.verify(example, task.demonstration(example)).correct


class Made:
  """Batches that note which were made, and that fail at one step."""

  def __init__(self, fails_at=-1):
    self.steps, self.fails_at = [], fails_at

  def __getitem__(self, step):
    self.steps.append(step)
    if step == self.fails_at:
      raise data.DataError(f"step {step}")
    return step * 10


def test_the_next_batch_is_made_while_this_one_is_used():
  made = Made()
  with contextlib.closing(data.Ahead(made, 4)) as ahead:
    for step in (0, 1, 2, 3):
      assert ahead[step] == step * 10
      end = time.monotonic() + 10
      while len(made.steps) < min(step + 2, 4):
        assert time.monotonic() < end
        time.sleep(1e-3)
  assert made.steps == [0, 1, 2, 3]  # each once, none past the last


def test_batches_made_ahead_are_those_of_their_steps_in_any_order():
  made = Made(fails_at=3)
  with contextlib.closing(data.Ahead(made, 100)) as ahead:
    for step in (5, 6, 2, 2, 7, 0):
      assert ahead[step] == step * 10
    assert ahead[2] == 20  # and begins with 3, whose failure is not of 2
    with pytest.raises(data.DataError, match="step 3"):
      ahead[3]
    assert ahead[4] == 40
