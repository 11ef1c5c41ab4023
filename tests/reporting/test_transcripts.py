"""What a run keeps of single completions, against loops over them."""

import numpy as np

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


def test_calibration_rows_are_short_numbers_of_the_first_completions():
  columns = {"target": np.arange(600) / 7, "estimate": np.ones(600)}
  rows = transcripts.calibration_rows(columns)
  assert len(rows) == transcripts.CALIBRATION_ROWS
  assert rows[1] == {"target": 0.142857, "estimate": 1.0}


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
