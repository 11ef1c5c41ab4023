"""Training of an adapter: one reference, one base, and only the adapter moves."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_runs
import tiny_steps as steps

import rspo_jax
from rspo_jax import main
from rspo_jax.algorithm.microbatches import StepSettings
from rspo_jax.algorithm.types import init_state
from rspo_jax.algorithm.update import make_estimate
from rspo_jax.models import adapters, functions, lora
from rspo_jax.run import program as program_lib

SETTINGS = lora.LoraSettings(rank=2, alpha=4.0)


def random_adapter(seed):
  """An adapter that changes something: B is not zero."""
  adapter = lora.init(steps.CONFIG, SETTINGS, jax.random.key(seed))
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.standard_normal(x.shape) * 0.1, jnp.float32),
    adapter,
  )


def test_both_streams_are_the_merged_models_and_share_one_gradient():
  """Dual scores and gradients against two merged models, one after another."""
  base, batch = steps.transformer_params(), steps.batch_of()
  policy, reference = random_adapter(1), random_adapter(2)
  one = functions.make_logprob_fn(steps.CONFIG)
  both = functions.make_logprob_fn(steps.CONFIG, dual=True)

  def update_of(join, logprob_fn, pair_fn=None):
    return jax.jit(
      steps.make_update(
        StepSettings(steps.GROUP),
        steps.objective_of(),
        logprob_fn=logprob_fn,
        join=join,
        pair_fn=pair_fn,
      )
    )

  frozen = lora.Adapted(base, None, reference, SETTINGS.scale)
  weighed = lambda fn: lambda params, *a: fn(lora.weights(params), *a)  # noqa: E731
  state = init_state(policy, optax.sgd(1.0))
  dual, metrics = update_of(program_lib.joined, weighed(one), weighed(both))(
    state, batch, steps.KEY, None, frozen=frozen
  )

  estimate = jax.jit(
    make_estimate(one, steps.MASK_ID, StepSettings(steps.N), steps.MASKS)
  )
  merged = lora.merge(base, reference, SETTINGS.scale)
  scores = estimate(merged, batch, steps.KEY)
  join = lambda adapter, base, _: lora.merge(base, adapter, SETTINGS.scale)  # noqa: E731
  apart, others = update_of(join, one)(
    state, batch, steps.KEY, scores, frozen=base
  )
  steps.assert_close(
    jax.tree.map(jnp.subtract, policy, apart.params),
    jax.tree.map(jnp.subtract, policy, dual.params),
    1e-5,
  )
  for key in metrics:
    np.testing.assert_allclose(
      metrics[key], others[key], rtol=1e-5, atol=1e-6, err_msg=key
    )
  assert float(metrics["score/relative_std"]) > 1e-3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """Argument vectors of runs with an adapter of rank 2."""
  folder = tmp_path_factory.mktemp("lora")
  tiny_runs.save_checkpoint(folder / "checkpoint")
  tiny_runs.save_puzzles(folder / "puzzles.jsonl")

  def argv(name, **overrides):
    values = dict(run__steps=2, eval__every=0, lora__rank=2, lora__alpha=4.0)
    return tiny_runs.command(
      folder / name,
      folder / "checkpoint",
      folder / "puzzles.jsonl",
      folder / "cache",
      **(values | overrides),
    )

  argv.folder = folder
  return argv


@pytest.fixture(scope="module")
def whole(tiny):
  """A run in one go: two passes, policy and reference in one forward."""
  assert main.main(tiny("whole")) == 0
  return tiny.folder / "whole"


def test_the_first_relative_scores_are_exactly_zero(whole, capsys):
  first = tiny_runs.rows(whole)[1]
  assert first["score/relative_std"] == first["score/relative_mean"] == 0.0
  assert first["grad_norm"] > 0
  assert tiny_runs.rows(whole)[2]["score/relative_std"] > 0


def test_one_pass_and_two_give_the_same_run(whole, tiny):
  assert main.main(tiny("one", train__passes="one")) == 0
  for row, other in zip(
    tiny_runs.repeatable(whole),
    tiny_runs.repeatable(tiny.folder / "one"),
    strict=True,
  ):
    assert row.keys() == other.keys()
    for key in ("loss", "grad_norm", "reward/mean", "score/relative_std"):
      if key in row:
        assert row[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6)


def test_exports_are_the_base_plus_what_was_learned(whole, tiny):
  base = rspo_jax.load_model(tiny.folder / "checkpoint")
  settings, adapter, _ = adapters.load_adapter(whole / "adapter", base.config)
  assert settings.rank == 2 and settings.alpha == 4.0
  assert set(settings.targets) == set(lora.PROJECTIONS)
  learned = [np.abs(pair["b"]).max() for pair in adapter["layers"].values()]
  assert min(learned) > 0
  exported = rspo_jax.load_model(whole / "model").params
  for name in lora.PROJECTIONS:
    pair = adapter["layers"][name]
    by_hand = np.asarray(base.params["layers"][name]["kernel"], np.float64)
    by_hand = by_hand + 2.0 * np.asarray(pair["a"], np.float64) @ pair["b"]
    np.testing.assert_allclose(
      exported["layers"][name]["kernel"], by_hand, rtol=1e-5, atol=1e-7
    )
  np.testing.assert_array_equal(
    exported["embed"]["embedding"], base.params["embed"]["embedding"]
  )


def test_a_checkpoint_holds_the_adapter_alone_and_a_run_goes_on_from_it(
  whole, tiny, monkeypatch
):
  program = tiny_runs.program_of(tiny("cut"))
  shapes = jax.tree.leaves(program.state_template.params)
  assert len(shapes) == 2 * len(lora.PROJECTIONS)
  tiny_runs.disturb(monkeypatch, "train", 1, tiny_runs.ask_to_stop)
  assert main.main(tiny("cut")) == 75
  assert main.main(tiny("cut")) == 0
  assert tiny_runs.repeatable(tiny.folder / "cut") == tiny_runs.repeatable(
    whole
  )
  assert tiny_runs.files(tiny.folder / "cut" / "adapter") == tiny_runs.files(
    whole / "adapter"
  )


def test_a_run_starts_from_an_adapter_folder_and_refers_to_it(whole, tiny):
  path = str(whole / "adapter")
  argv = tiny("next", lora__path=path, lora__rank=0, run__steps=1)
  assert main.main(argv) == 0
  rows = tiny_runs.rows(tiny.folder / "next")
  assert rows[1]["score/relative_std"] == 0.0
  # Its model before the first step is the one that the other run ended with.
  last = tiny_runs.rows(whole)[-1]
  assert rows[0]["eval/reward"] == pytest.approx(last["eval/reward"])
  written = json.loads(
    (tiny.folder / "next" / "adapter" / "adapter_config.json").read_text()
  )
  assert written["r"] == 2


def test_the_adapter_folder_may_lie_in_a_bucket(whole, tiny, bucket, capsys):
  from etils import epath

  there = epath.Path("gs://bucket/adapters/one")
  for name, content in tiny_runs.files(whole / "adapter").items():
    (there / name).write_bytes(content)
  here, far = (
    program_lib.fresh_state(
      tiny_runs.program_of(tiny("unused", lora__path=str(path), lora__rank=0))
    )
    for path in (whole / "adapter", there)
  )
  jax.tree.map(np.testing.assert_array_equal, far.params, here.params)
  missing = tiny("missing", lora__path="gs://bucket/adapters/two")
  assert main.main(missing) == 2
  assert "gs://bucket/adapters/two does not exist" in " ".join(
    capsys.readouterr().err.split()
  )
  assert not (tiny.folder / "missing").exists()


@pytest.mark.parametrize(
  ("overrides", "said"),
  [
    ({"lora__rank": -1}, r"lora\.rank=-1"),
    ({"lora__alpha": 0.0}, r"lora\.alpha=0"),
    ({"lora__targets": "query,keys"}, "'keys' is none of them"),
    ({"lora__path": "/nowhere"}, "holds no adapter_config.json"),
  ],
)
def test_adapters_that_cannot_be_are_refused_before_anything_is_written(
  overrides, said, tiny, capsys
):
  import re

  assert main.main(tiny("refused", **overrides)) == 2
  assert re.search(said, capsys.readouterr().err)
  assert not (tiny.folder / "refused").exists()


def test_another_rank_than_that_of_the_folder_is_refused(whole, tiny, capsys):
  argv = tiny("other", lora__path=str(whole / "adapter"), lora__rank=3)
  assert main.main(argv) == 2
  said = " ".join(capsys.readouterr().err.split())
  assert "lora.rank=3 is not that of" in said
  assert not (tiny.folder / "other").exists()
