"""From a config to frozen settings; one run is told from another."""

import dataclasses
import json
import sys

import pytest

from configs import base, countdown, sft_countdown, sudoku
from rspo_jax.config import identity, schema
from rspo_jax.run import rules, settings
from rspo_jax.storage import mirror


@pytest.fixture
def config(tiny):
  """The sudoku config on the tiny checkpoint."""
  config = sudoku.get_config()
  config.model.path = str(tiny.checkpoint)
  return config


def test_settings_hold_what_the_config_says(config):
  config.rollout.prompts, config.rollout.group_size = 6, 4
  config.train.micro_batch = 12
  config.rollout.temperature = 1.5
  config.eval.temperature = 0.5
  config.objective.lambda_ = 0.25
  config.objective.lambda_unit = "sequence"
  config.run.steps = 17
  built = settings.build(config, 1)
  assert built.rollout == schema.Rollout(6, 4, 1.5)
  assert built.sampler.temperature == 1.5
  assert built.greedy.temperature == 0.0
  assert built.sampled.temperature == 0.5
  assert built.objective.lambda_ == 0.25
  assert built.objective.group_size == 4
  assert built.objective.draw_size == 2  # pairs, of the complementary scheme
  assert built.optimizer.total_steps == built.run.steps == 17
  assert built.step.micro_batch == 12 and built.step.shards == 1
  assert built.model_folder == config.model.path
  assert not built.supervised
  with pytest.raises(dataclasses.FrozenInstanceError):
    built.run.steps = 3


@pytest.mark.parametrize(
  ("length", "own", "expected"),
  [
    # eval.completion_length, eval.block_length and eval.steps -> L, block, T
    (0, (0, 0), (16, 8, 8)),
    (32, (0, 0), (32, 8, 16)),
    (8, (0, 0), (8, 8, 4)),
    (4, (0, 0), (4, 4, 2)),
    (32, (16, 6), (32, 16, 6)),
  ],
)
def test_steps_of_an_evaluation_follow_its_length(
  length, own, expected, config
):
  config.sampler.completion_length = 16
  config.sampler.block_length = 8
  config.sampler.steps = 8
  config.eval.completion_length = length
  config.eval.block_length, config.eval.steps = own
  for sampler in (
    settings.build(config, 1).greedy,
    settings.build(config, 1).sampled,
  ):
    found = sampler.completion_length, sampler.block_length, sampler.steps
    assert found == expected


def test_fast_rollouts_reach_training_and_evaluation(config):
  assert settings.build(config, 1).sampler.cache == "none"
  config.sampler.cache = "dual"
  config.sampler.threshold = 0.9
  config.sampler.stop_at_eos = True
  built = settings.build(config, 1)
  for found in (built.sampler, built.greedy, built.sampled):
    assert (found.cache, found.threshold, found.factor) == ("dual", 0.9, None)
    assert found.stop_at_eos and found.top_p is found.top_k is None
  config.sampler.cache, config.sampler.threshold = "none", 0.0
  config.sampler.algorithm, config.sampler.top_p = "entropy", 0.9
  config.sampler.top_k, config.sampler.order_temperature = 7, 0.5
  config.sampler.cfg_scale = 0.5
  found = settings.build(config, 1).sampler
  assert (found.top_p, found.top_k, found.order_temperature) == (0.9, 7, 0.5)
  assert found.threshold is None and found.cfg_scale == 0.5


@pytest.mark.parametrize(
  ("keys", "message"),
  [
    ({"cache": "full"}, "sampler.cache='full' .* dual, none, prefix"),
    ({"cache": "dual", "cfg_scale": 1.0}, "cache='dual' does not work with"),
    ({"threshold": 0.9, "factor": 1.0}, "exclude each other"),
    ({"threshold": -0.5}, "sampler.threshold=-0.5 must"),
    ({"threshold": 0.9, "algorithm": "entropy"}, "has its own schedule"),
    ({"threshold": 0.9, "remasking": "random"}, "compares probabilities"),
    ({"top_k": 5}, "top_k=5 needs one of Dream's"),
    ({"top_k": -1}, "top_k=-1 must not be negative"),
    ({"algorithm": "origin", "top_p": 0.0}, "top_p=0.0 must lie in"),
    ({"order_temperature": 1.0}, "order_temperature=1.0 needs one of Dream's"),
    ({"steps": 3}, "sampler.steps=3 must be a multiple"),
  ],
)
def test_rollouts_that_cannot_be_are_refused_without_jax(
  config, keys, message, monkeypatch
):
  # An import of JAX would fail here.
  monkeypatch.setitem(sys.modules, "jax", None)
  config.sampler.block_length = 8
  for key, value in keys.items():
    config.sampler[key] = value
  with pytest.raises(ValueError, match=message):
    rules.check_early(config)


def test_what_was_not_sampled_is_not_scored(config):
  config.sampler.stop_at_eos = True
  config.likelihood.scope = "canvas"
  with pytest.raises(ValueError, match=r"stop_at_eos=True.*scope='completion'"):
    rules.check_early(config)
  config.likelihood.scope = "completion"
  rules.check_early(config)


def test_a_batch_must_be_divisible_by_the_devices_that_share_it(config):
  config.rollout.prompts = 12
  config.eval.batch = 256
  config.train.micro_batch = 24
  with pytest.raises(ValueError, match=r"rollout\.prompts=12 .* use 16"):
    settings.build(config, 8)
  config.rollout.prompts = 16
  config.train.micro_batch = 12
  with pytest.raises(ValueError, match=r"train\.micro_batch=12 .* use 16"):
    settings.build(config, 8)
  config.train.micro_batch = 16
  config.eval.batch = 60
  with pytest.raises(ValueError, match=r"eval\.batch=60 .* use 64"):
    settings.build(config, 8)
  config.eval.batch = 64
  assert settings.build(config, 8).step.shards == 8
  # Heads, not sequences, are split over the tensor axis.
  config.mesh.tensor = 4
  assert settings.build(config, 8).step.shards == 2


def test_masks_at_a_time_are_whole_draws_that_divide_them(config):
  config.likelihood.masks = 8
  for wish, built in ((0, 0), (2, 2), (4, 4), (8, 0)):
    config.train.micro_masks = wish
    assert settings.build(config, 1).step.micro_masks == built
  for wish, near in ((3, 2), (5, 4), (16, 8)):
    config.train.micro_masks = wish
    with pytest.raises(
      ValueError, match=rf"train\.micro_masks={wish} .*{near}"
    ):
      settings.build(config, 1)


def test_the_nearest_micro_batch_that_fits_is_named(config):
  config.rollout.prompts, config.rollout.group_size = 15, 4
  config.train.micro_batch = 25
  with pytest.raises(ValueError, match=r"the 60 sequences .* use (20|30)"):
    settings.build(config, 1)


def test_a_home_folder_may_be_written_short(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "model").mkdir()
  (tmp_path / "model" / "config.json").write_text("{}")
  found = rules.resolve_model_path("~/model")
  assert found == str(tmp_path / "model")
  assert mirror.Home("~/run").local == tmp_path / "run"


@pytest.mark.parametrize("number", [1, 2, 12, 97, 360, 2**20])
def test_nearest_divisor_is_the_nearest_divisor(number):
  for wish in (1, 2, 7, 50, number, 3 * number):
    found = settings._nearest_divisor(number, wish)
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    assert abs(found - wish) == min(abs(d - wish) for d in divisors)
    assert found in divisors


def test_a_huge_batch_is_refused_at_once(config):
  config.rollout.prompts = 2**30
  config.train.micro_batch = 7
  with pytest.raises(ValueError, match="use"):
    settings.build(config, 1)


def test_one_pass_is_refused_where_it_would_not_be_exact(config):
  config.train.passes = "one"
  config.objective.centring = "batch"
  with pytest.raises(ValueError, match=r"train\.passes='one'.*'batch'"):
    settings.build(config, 1)
  total = config.rollout.prompts * config.rollout.group_size
  config.train.micro_batch = total
  settings.build(config, 1)


def test_supervised_settings_know_that_they_are(config):
  sft_countdown.supervised(config)
  config.model.path = ""
  assert settings.build(config, 1).supervised


def test_embedded_checkpoints_resolve_to_the_package(tmp_path):
  for name in rules.embedded_names():
    folder = rules.resolve_model_path(f"embedded:{name}")
    assert folder.endswith(f"rspo_jax/checkpoints/{name}")
  assert rules.resolve_model_path("gs://bucket/x") == "gs://bucket/x"


# One run and another.


def as_dict(**changes):
  """A resolved config with changed keys, `__` for the dot."""
  config = countdown.get_config()
  for key, value in changes.items():
    group, _, name = key.partition("__")
    config[group][name] = value
  return config.to_dict()


def test_flat_names_every_leaf_once():
  nested = {"a": 1, "b": {"c": 2, "d": {"e": 3}}, "f": {}}
  assert identity.flat(nested) == {"a": 1, "b.c": 2, "b.d.e": 3}


def test_the_hash_tells_configs_apart_and_nothing_else():
  one = identity.config_hash(as_dict())
  assert one == identity.config_hash(dict(reversed(list(as_dict().items()))))
  assert one != identity.config_hash(as_dict(run__seed=1))
  assert len(one) == 8 and int(one, 16) >= 0
  # What is written is what was hashed.
  assert one == identity.config_hash(json.loads(json.dumps(as_dict())))


def test_the_same_config_is_the_same_run():
  identity.check_same_run(as_dict(), as_dict(), "DIR")


def test_keys_that_change_a_run_are_named():
  with pytest.raises(ValueError) as error:
    identity.check_same_run(
      as_dict(), as_dict(run__seed=3, optimizer__b1=0.5), "DIR"
    )
  assert "run.seed=3 (was 0)" in str(error.value)
  assert "optimizer.b1=0.5 (was 0.9)" in str(error.value)
  assert "DIR" in str(error.value)


def test_a_key_that_moved_since_the_run_began_is_said_with_its_place():
  old = as_dict()
  old["objective"]["bound_mix"] = 0.5
  with pytest.raises(ValueError) as error:
    identity.check_same_run(old, as_dict(), "DIR")
  said = "objective.bound_mix (was 0.5) is no key any more; it may be "
  assert said + "objective.spg.bound_mix now" in str(error.value)


@pytest.mark.parametrize("key", sorted(schema.FREE_KEYS))
def test_keys_that_do_not_change_a_run_exist_and_may_change(key):
  config = as_dict()
  group, _, name = key.partition(".")
  value = config[group][name]
  changed = {bool: True, int: 5, float: 5.0, str: "x"}[type(value)]
  identity.check_same_run(
    config, as_dict(**{key.replace(".", "__"): changed}), "DIR"
  )


def test_a_long_list_of_changes_is_cut():
  flat = identity.flat(base.get_config().to_dict())
  groups = {key.split(".")[0] for key in flat}
  other = {group: {} for group in groups}
  with pytest.raises(ValueError, match=r" and \d+ more\. Use another"):
    identity.check_same_run(as_dict(), other, "DIR")
