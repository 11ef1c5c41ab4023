"""The diagnosis: exact scores, what is measured of draws, the command."""

import dataclasses
import itertools
import json
import math
import types

import jax
import numpy as np
import pytest

from rspo_jax import diagnose, likelihood


def test_all_masks_average_to_the_count_uniform_elbo():
  rng = np.random.default_rng(0)
  table = rng.normal(-2, 1, (16, 4))  # log-probs by hidden set and position
  scored = np.arange(4) < np.array([[4], [3], [1]])
  masks = diagnose.all_masks(scored, 2, "completion")
  assert masks.corrupt.shape == (3, 15, 1, 6)
  assert not masks.corrupt[..., :2].any()
  for i, length in enumerate((4, 3, 1)):
    exact = 0.0
    for size in range(1, length + 1):
      subsets = list(itertools.combinations(range(length), size))
      for subset in subsets:
        code = sum(1 << j for j in subset)
        exact += np.mean(table[code, list(subset)]) / len(subsets) / length
    codes = (masks.corrupt[i, :, 0, 2:] * (1 << np.arange(4))).sum(-1)
    found = (masks.weight[i, :, 0] * table[codes]).sum(-1).mean()
    assert found == pytest.approx(exact, rel=1e-5)


def test_bias_variance_and_error_are_those_of_the_definition():
  rng = np.random.default_rng(1)
  exact, shared = rng.normal(0, 1, 5), rng.normal(0, 1, (4000, 5))
  own = rng.normal(0, 0.5, (4000, 5))
  policy = 0.3 + exact + shared + own  # bias 0.3, noise of variance 0.25
  found = diagnose.measure(policy, shared, exact)
  assert found["bias"] == pytest.approx(0.3, abs=0.02)
  assert found["variance"] == pytest.approx(0.25, rel=0.05)
  assert found["mse"] == pytest.approx(0.34, rel=0.05)
  # Cov = 1, variances 1.25 and 1.
  correlation = 1 / math.sqrt(1.25)
  assert found["noise_correlation"] == pytest.approx(correlation, abs=0.02)


def test_the_interval_of_a_ratio_covers_it():
  rng = np.random.default_rng(2)
  other = rng.gamma(2.0, 1.0, 400)
  ratio, low, high = diagnose.ratio_interval(0.7 * other, other)
  assert ratio == pytest.approx(0.7) and low == pytest.approx(0.7)
  noisy = 0.7 * rng.gamma(2.0, 1.0, 400)
  ratio, low, high = diagnose.ratio_interval(noisy, other)
  assert low < 0.7 < high and high - low < 0.2


@pytest.mark.parametrize(
  ("word", "message"),
  [
    ("--steps=no", "--steps=no must be a whole number"),
    ("--forwards=2,0", "--forwards=0 must"),
    ("--out=", "--out needs a value"),
    ("--schemes=pairs", "--schemes='pairs' is not known"),
  ],
)
def test_words_that_mean_nothing_are_refused(word, message):
  with pytest.raises(ValueError, match=message):
    diagnose.parse(["diagnose", "--config=c", word])


def test_an_adapter_is_refused_before_anything_is_trained(
  tiny, tmp_path, capsys
):
  words = [w for w in tiny("unused") if not w.startswith("--workdir")]
  words += [f"--out={tmp_path / 'out'}", "--config.lora.rank=4", "--steps=1"]
  assert diagnose.run(words) == 2
  assert "lora.rank=4" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


def test_a_link_that_leads_nowhere_is_refused_as_a_folder(
  tiny, tmp_path, capsys
):
  link = tmp_path / "link"
  link.symlink_to(tmp_path / "gone")
  words = [w for w in tiny("unused") if not w.startswith("--workdir")]
  words += [f"--out={link}", "--sequences=4"]
  assert diagnose.run(words) == 2
  said = capsys.readouterr().err
  assert f"{link} is a symbolic link" in said and "remove the link" in said


@pytest.mark.slow  # compiles a dozen programs
def test_the_command_writes_numbers_and_says_what_is_wrong(
  tiny, tmp_path, quick_runs, capsys, monkeypatch
):
  monkeypatch.setattr(diagnose, "LONG_PAIRS", 32)
  folder = tmp_path / "out"
  words = [w for w in tiny("unused") if not w.startswith("--workdir")]
  words += [f"--out={folder}", f"--policy={tiny.checkpoint}", "--forwards=2"]
  words += ["--sequences=4", "--repeats=3", "--schemes=complementary"]
  assert diagnose.run(words) == 0
  result = json.loads((folder / "diagnose.json").read_text())
  assert {row["scheme"] for row in result["rows"]} == {
    "uniform",
    "complementary",
  }
  # Policy and reference are one: d is 0, and so is every error of it.
  for row in result["rows"]:
    assert row["mse"] == pytest.approx(0, abs=1e-10)
    assert row["noise_correlation"] == pytest.approx(1)
  assert result["relative_std"] == pytest.approx(0, abs=1e-6)
  assert "complementary" in capsys.readouterr().out
  assert diagnose.run([*words, "--sequences=9999"]) == 2
  assert "--sequences=9999 is more" in capsys.readouterr().err


def test_every_scheme_finds_its_number_of_canvases():
  from rspo_jax import sampler

  settings = types.SimpleNamespace(
    sampler=sampler.SamplerSettings(8, 4, 4),
    likelihood=likelihood.LikelihoodSettings(),
  )
  two = diagnose.schemes_at(2, settings, likelihood.ESTIMATORS)
  assert "simpson" not in two and two["trace"].shrink == 2
  assert "complementary" not in diagnose.schemes_at(
    3, settings, likelihood.ESTIMATORS
  )
  # A threshold may take as many steps as there are positions.
  settings.sampler = sampler.SamplerSettings(8, 4, 4, threshold=0.9)
  two = diagnose.schemes_at(2, settings, likelihood.ESTIMATORS)
  assert two["trace"].shrink == 4


def test_every_measurement_keeps_the_runs_own_likelihood_settings():
  from rspo_jax import sampler

  own = likelihood.LikelihoodSettings(
    scope="masked_tail", block_length=2, prompt_mask=0.4
  )
  seen = []

  class Bench(diagnose.Bench):
    """Remembers what it is asked to draw with."""

    def __init__(self):
      settings = types.SimpleNamespace(
        sampler=sampler.SamplerSettings(16, 8, 16), likelihood=own
      )
      self.program = types.SimpleNamespace(settings=settings)
      scored = np.ones((2, 16), bool)
      self.batch = types.SimpleNamespace(completion_mask=scored)

    def scorer(self, settings, dtype=None):
      seen.append(settings)
      return settings

    def relative(self, score, key):
      return np.zeros(2)

    def draws(self, settings, repeats):
      self.scorer(settings)
      return np.zeros((repeats, 2)), np.zeros((repeats, 2))

    def gradient_snr(self, settings):
      self.scorer(settings)
      return {}

  diagnose.diagnose(Bench(), [2, 4], 3)
  assert {one.scheme for one in seen} > {"uniform", "mean_field", "trace"}
  for one in seen:
    kept = {"scheme": own.scheme, "masks": own.masks, "shrink": own.shrink}
    assert dataclasses.replace(one, **kept) == own, one


def test_all_masks_show_a_masked_tail_as_drawn_ones_do():
  scored = np.arange(4) < np.array([[4], [2], [1]])
  settings = likelihood.LikelihoodSettings(
    scheme="uniform", masks=512, scope="masked_tail"
  )
  drawn = likelihood.draw_masks(jax.random.key(0), settings, scored, 2)
  every = diagnose.all_masks(scored, 2, "masked_tail")
  for i in range(3):
    hidden = np.asarray(drawn.corrupt[i]).reshape(-1, 6)
    counted = every.weight[i].reshape(15, -1).any(-1)
    allowed = every.corrupt[i, counted, 0]
    assert {tuple(row) for row in hidden} == {tuple(row) for row in allowed}
