"""What a run keeps of single completions, against loops over them."""

import numpy as np
import pytest

from rspo_jax.algorithm import objectives
from rspo_jax.config import schema
from rspo_jax.reporting import transcripts
from rspo_jax.run import provenance

N, K, GROUP = 24, 4, 4


class Letters:
  """A tokenizer of letters, 0 being special."""

  calls = 0

  def decode(self, ids, skip_special=True):
    Letters.calls += 1
    assert not skip_special
    return "".join("<eos>" if i == 0 else chr(96 + i) for i in ids)


def test_pieces_stop_at_the_first_eos_and_keep_their_forward():
  tokens = np.array([[1, 2, 0, 3], [3, 3, 3, 3]])
  scored = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool)
  steps = np.array([[1, 0, 0, 1], [3, 2, 1, -1]])
  pieces = transcripts.Pieces(Letters())
  rows = transcripts.denoising_rows(pieces, tokens, scored, steps)
  assert rows == [
    {"pieces": ["a", "b", "<eos>"], "commit_step": [1, 0, 0]},
    {"pieces": ["c"] * 4, "commit_step": [3, 2, 1, -1]},
  ]
  before = Letters.calls
  assert pieces([1, 1, 0]) == ["a", "a", "<eos>"]
  assert Letters.calls == before  # each token is read once


@pytest.mark.parametrize("unit", schema.LAMBDA_UNITS)
@pytest.mark.parametrize("centring", schema.CENTRINGS)
def test_estimates_and_gaps_are_those_of_a_loop_over_completions(
  unit, centring
):
  rng = np.random.default_rng(0)
  policy, reference = rng.normal(size=(2, N, K))
  advantage, length = rng.normal(size=N), rng.integers(1, 9, N)
  keep = np.repeat([1, 1, 0, 1, 0, 1], GROUP).astype(float)
  row = rng.permutation(N)
  settings = objectives.ObjectiveSettings(
    lambda_=2.0, lambda_unit=unit, centring=centring, group_size=GROUP
  )
  found = transcripts.calibration(
    policy, reference, advantage, length, keep, row, settings
  )
  wanted = {}
  for i in range(N):
    if not keep[i]:
      continue

    def d(j):
      scale = length[j] if unit == "sequence" else 1
      return scale * sum(policy[j] - reference[j]) / K

    if centring == "group":
      others = [j for j in range(N) if j // GROUP == i // GROUP and keep[j]]
    else:
      others = [j for j in range(N) if keep[j]]
    mean = sum(map(d, others)) / len(others) if centring != "none" else 0.0
    wanted[row[i]] = (d(i) - mean, advantage[i], advantage[i] / 2.0)
  order = sorted(wanted)
  for place, name in enumerate(("estimate", "advantage", "target")):
    np.testing.assert_allclose(
      found[name], [wanted[r][place] for r in order], atol=1e-12
    )
  np.testing.assert_allclose(
    found["gap"], found["advantage"] - 2.0 * found["estimate"]
  )
  rows = transcripts.calibration_rows(found)
  assert len(rows) == len(order)
  assert rows[0]["target"] == pytest.approx(found["target"][0], rel=1e-5)


def test_without_lambda_there_is_no_target():
  ones = np.ones(GROUP)
  settings = objectives.ObjectiveSettings(lambda_=0.0, group_size=GROUP)
  found = transcripts.calibration(
    np.ones((GROUP, 2)), np.zeros((GROUP, 2)), ones, ones, ones,
    np.arange(GROUP), settings,
  )  # fmt: skip
  assert "target" not in found
  np.testing.assert_array_equal(found["gap"], ones)


def test_readable_samples_name_each_prompt_once():
  verdict = {"reason": "reaches 6"}
  rows = [
    {"prompt": "1,2,3=6", "completion": c, "correct": ok, "reward": r} | more
    for c, ok, r, more in (
      ("1+2+3", True, 1.0, {"verdict": verdict}),
      ("1*1", False, 0.1, {}),
    )
  ]
  assert transcripts.readable(rows) == (
    "1,2,3=6\n  1+2+3  [right, reward 1: reaches 6]\n  1*1  [wrong, reward 0.1]"
  )


def test_the_environment_names_versions_and_devices_but_no_person_or_place():
  import getpass
  import json
  import socket

  import jax

  found = provenance.describe()
  assert found["versions"]["jax"] == jax.__version__
  assert found["devices"] == jax.device_count()
  text = json.dumps(found)
  assert socket.gethostname() not in text
  assert f"/{getpass.getuser()}" not in text
