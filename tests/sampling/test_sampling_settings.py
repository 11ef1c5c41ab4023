"""Options of the sampler that fit together, and those that do not."""

import pytest

from rspo_jax.models.cache import CACHES
from rspo_jax.sampling import proposals, schedules, settings
from rspo_jax.sampling.settings import SamplerSettings


def settings_of(length=12, block=4, steps=6, **options):
  return SamplerSettings(length, block, steps, **options)


def test_the_names_of_the_settings_are_those_that_are_implemented():
  assert tuple(schedules.ALGORITHMS) == settings.ALGORITHMS
  assert tuple(proposals.REMASKING) == settings.REMASKING
  assert tuple(CACHES) == settings.CACHES


@pytest.mark.parametrize(
  "options,message",
  [
    ({"length": 256, "block": 32, "steps": 100}, "steps=100.*=8; use 96 or 104"),
    ({"length": 24, "block": 4, "steps": 3}, "steps=3 .*=6; use 6"),
    ({"length": 12, "block": 5}, "block_length=5 must divide.*=12; use 4 or 6"),
    ({"length": 0}, "completion_length=0 must be a whole number"),
    ({"steps": 2.5}, "steps=2.5 must be a whole number"),
    ({"temperature": -1.0}, "temperature=-1.0 must be 0 or more"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"remasking": "best"}, "'best' must be one of low_confidence, random"),
    ({"algorithm": "greedy"}, "'greedy' must be one of llada, maskgit_plus"),
    ({"cache": "full"}, "'full' must be one of none, prefix, dual"),
    ({"mask_policy": "x"}, "'x' must be one of forbid, compete"),
    ({"top_p": 0.9}, "top_p=0.9 needs one of Dream's"),
    ({"algorithm": "entropy", "top_p": 0.0}, "top_p=0.0 must lie in"),
    ({"algorithm": "entropy", "top_k": 0}, "top_k=0 must be a whole number of at least 1"),
    ({"algorithm": "entropy", "threshold": 0.9}, "threshold=0.9 needs algor"),
    ({"algorithm": "origin", "remasking": "random"}, "needs algorithm='llada'"),
    ({"threshold": 0.0}, "threshold=0.0 must be positive"),
    ({"threshold": 0.9, "factor": 1.0}, "exclude each other"),
    ({"factor": 0.0}, "factor=0.0 must be positive"),
    ({"threshold": 0.9, "remasking": "random"}, "compares probabilities"),
    ({"cache": "dual", "cfg_scale": 1.0}, "cache='dual' does not work with"),
    ({"order_temperature": 1.0}, "order_temperature=1.0 needs one of Dream's"),
    ({"time_epsilon": 0.0}, "time_epsilon=0.0 must lie between"),
  ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused_with_a_remedy(options, message):
  with pytest.raises(ValueError, match=message):
    settings.validate(settings_of(**options))


@pytest.mark.parametrize(
  "options,call,message",
  [
    ({}, {"canvas_shape": (2, 8)}, "cannot hold .*completion_length=12"),
    ({"stop_at_eos": True}, {}, "need eos_id"),
    ({"confidence_eos_eot_inf": True}, {"eos_id": 1}, "needs eot_id"),
    ({}, {"first_block": 3}, "first_block=3.* 3 blocks with 2 steps"),
    ({}, {"first_step": 2}, "first_step=2 must lie inside"),
  ],
)
def test_calls_that_do_not_fit_are_refused(options, call, message):
  call = {"canvas_shape": (2, 20), **call}
  with pytest.raises(ValueError, match=message):
    settings.check_call(settings_of(**options), **call)
