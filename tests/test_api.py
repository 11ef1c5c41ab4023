"""What users call: lazy, checked before it compiles, equal to the originals."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

import rspo_jax
from rspo_jax import api, sampler
from rspo_jax.tokenizer import build_word_tokenizer


def case(shared, folder, name):
  """One recorded case: its entry and its arrays."""
  folder = shared / "fixtures" / folder
  entries = json.loads((folder / "cases.json").read_text())
  entry = next(e for e in entries if e["name"] == name)
  return entry, np.load(folder / entry["file"])


@pytest.fixture(scope="module")
def models(shared):
  """Loaded tiny checkpoints by name, each read once."""
  loaded = {}

  def get(name):
    if name not in loaded:
      path = shared / "fixtures" / "models" / name
      loaded[name] = rspo_jax.load_model(path)
    return loaded[name]

  return get


# --- The package -------------------------------------------------------------


def test_importing_the_package_does_not_wait_for_jax():
  code = (
    "import sys, rspo_jax\n"
    "assert rspo_jax.__version__\n"
    "assert {'generate', 'load_model', 'verify'} <= set(dir(rspo_jax))\n"
    "heavy = {'jax', 'flax', 'numpy', 'tokenizers'} & set(sys.modules)\n"
    "assert not heavy, heavy\n"
    "try: rspo_jax.nothing\n"
    "except AttributeError as error: assert 'nothing' in str(error)\n"
    "else: raise SystemExit('no AttributeError')\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_name_of_the_contract_is_there():
  for name in ("load_model", "logits", "generate", "verify", "save_model"):
    assert getattr(rspo_jax, name) is getattr(api, name)


# --- logits ------------------------------------------------------------------


def test_logits_predict_the_token_at_their_row(shared, models):
  for name, key in (
    ("dream_tiny", "plain.logits_shifted"),
    ("llada_tiny_gqa", "plain.logits"),
  ):
    recorded = np.load(
      shared / "fixtures" / "models" / name / "reference_logits.npz"
    )
    tokens = recorded["plain.input_ids"]
    logits = rspo_jax.logits(models(name), tokens)
    assert logits.dtype == np.float32
    assert np.abs(np.asarray(logits) - recorded[key]).max() <= 1e-3
    ones = np.ones(tokens.shape, np.int32)
    masked = rspo_jax.logits(models(name), tokens, ones)
    # A mask without zeros is no mask.
    assert np.abs(np.asarray(masked - logits)).max() <= 1e-6


def test_padding_is_not_attended_to(shared, models):
  recorded = np.load(
    shared / "fixtures/models/llada_tiny_A/reference_logits.npz"
  )
  tokens = recorded["leftpad.input_ids"]
  mask = recorded["leftpad.attention_mask"]
  model = models("llada_tiny_A")
  logits = np.asarray(rspo_jax.logits(model, tokens, mask))
  assert np.abs(logits - recorded["leftpad.logits"])[mask == 1].max() <= 1e-3
  other = np.where(mask == 1, tokens, 7)
  again = np.asarray(rspo_jax.logits(model, other, mask))
  assert (again == logits)[mask == 1].all()


@pytest.mark.parametrize(
  ("tokens", "mask", "message"),
  [
    ([1, 2], None, r"shape \(2,\)"),
    ([[]], None, r"shape \(1, 0\)"),
    ([[1.0]], None, "float64"),
    ([[1, 512]], None, r"id 512, outside .* 0\.\.511"),
    ([[-1, 3]], None, "id -1"),
    ([[1, 2]], [[1]], r"shape \(1, 1\), the tokens have \(1, 2\)"),
    ([[1, 2]], [[1, 2]], "only 0"),
    ([[1, 2], [1, 2]], [[1, 1], [0, 0]], "row 1"),
  ],
)
def test_bad_tokens_are_refused(models, tokens, mask, message):
  with pytest.raises(ValueError, match=message):
    rspo_jax.logits(models("llada_tiny_A"), tokens, mask)


# --- generate ----------------------------------------------------------------

LLADA_CASES = (
  "v05_uneven_blocks",
  "v08_leftpad_batch",
  "v09_cfg_leftpad",
  "v10_gumbel",
  "v11_random_remask",
  "v13_prompt_has_masks",
  "v15_conf_eos_eot_inf",
  "v17_leftover_mask",
  "v21_fast_plain_thr",
  "v23_fast_prefix_thr",
  "v25_fast_dual_thr",
)
DREAM_CASES = ("d04_entropy_leftpad", "d05_origin", "d07_maskgit_topp")


@pytest.mark.parametrize("name", LLADA_CASES)
def test_generate_writes_the_recorded_tokens(shared, models, name):
  entry, arrays = case(shared, "sampler", name)
  options = {k: v for k, v in entry["options"].items() if k != "mask_id"}
  caches = {"fast_prefix": "prefix", "fast_dual": "dual"}
  out = rspo_jax.generate(
    models(entry["model"]),
    arrays["prompt"],
    arrays.get("attention_mask"),
    cache=caches.get(entry["algo"], "none"),
    mask_id=entry["mask_id"],
    eos_id=entry.get("eos_id"),
    eot_id=entry.get("eot_id"),
    noise=arrays.get("uniform_noise"),
    **options,
  )
  assert (out.tokens == arrays["output"]).all()
  assert out.denoiser_calls == entry["nfe"]


@pytest.mark.parametrize("name", DREAM_CASES)
def test_generate_writes_what_diffusion_generate_wrote(shared, models, name):
  entry, arrays = case(shared, "dream_sampler", name)
  options = dict(entry["effective"])
  length = options.pop("max_new_tokens")
  out = rspo_jax.generate(
    models(entry["model"]),
    arrays["prompt"],
    arrays.get("attention_mask"),
    gen_length=length,
    block_length=length,
    algorithm=options.pop("alg"),
    noise=arrays.get("uniform_noise"),
    **options,
  )
  assert (out.tokens == arrays["output"]).all()
  assert out.denoiser_calls == options["steps"]


def prompts_of(n=2, length=5):
  """Some prompts."""
  return np.arange(n * length, dtype=np.int32).reshape(n, length) + 1


def settings_of(**changes):
  """Small valid settings."""
  return {"gen_length": 8, "steps": 4, "block_length": 4} | changes


def test_a_seed_repeats_and_another_differs_without_compiling_again(models):
  model = models("llada_tiny_A")
  before = api._generate._cache_size()

  def run(seed, prompts):
    settings = settings_of(temperature=1.0)
    return rspo_jax.generate(model, prompts, seed=seed, **settings).tokens

  first = run(1, prompts_of())
  compiled = api._generate._cache_size()
  assert compiled == before + 1
  assert (run(1, prompts_of()) == first).all()
  assert (run(2, prompts_of()) != first).any()
  run(2, prompts_of() + 3)
  assert api._generate._cache_size() == compiled


def test_given_parts_of_a_canvas_are_kept(models):
  model = models("llada_tiny_A")
  prompts = prompts_of()
  canvas = np.full((2, 8), model.config.mask_id, np.int32)
  canvas[0, 1:3] = (40, 41)
  canvas[1, 7] = 42
  out = rspo_jax.generate(model, prompts, canvas=canvas, **settings_of())
  given = canvas != model.config.mask_id
  assert (out.tokens[:, 5:][given] == canvas[given]).all()
  assert (out.commit_step[given] == -1).all()
  whole = np.concatenate([prompts, canvas], axis=1)
  again = rspo_jax.generate(model, prompts, canvas=whole, **settings_of())
  assert (again.tokens == out.tokens).all()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"steps": 3}, "steps=3 must be a multiple of.*2"),
    ({"block_length": 3}, "block_length=3 must divide"),
    (
      {"threshold": 0.9, "algorithm": "entropy", "block_length": 8},
      "threshold",
    ),
    ({"cache": "dual", "cfg_scale": 1.0}, "cache='dual'.*cfg_scale"),
    ({"algorithm": "entropy"}, "knows no blocks.*8 instead of 4"),
    ({"algorithm": "best"}, "maskgit_plus"),
    ({"remasking": "worst"}, "low_confidence"),
    ({"top_p": 0.9}, "top_p=0.9"),
    ({"mask_id": 512}, "mask_id=512 .*511"),
    ({"eos_id": -1}, "eos_id=-1"),
    ({"seed": -1}, "seed=-1"),
    ({"seed": 0.5}, "seed=0.5"),
    ({"canvas": np.ones((2, 7), np.int32)}, r"shape \(2, 7\).*\[2, gen_length"),
    ({"canvas": np.ones((2, 13), np.int32)}, "other tokens than prompts"),
    ({"noise": np.ones(3)}, r"noise has shape \(3,\)"),
    ({"noise": {"token": np.ones((1, 2))}}, "'token'"),
    ({"noise": np.ones((4, 2, 13, 5))}, r"\[T, 2, 13, 512\]"),
    ({"noise": np.ones((2, 2, 13, 512))}, "2 entries.*4 forwards"),
    ({"confidence_eos_eot_inf": True}, "eot_id"),
    ({"temperature": -1.0}, "temperature=-1.0"),
    (
      {"attention_mask": np.ones((2, 6))},
      r"\(2, 6\), the tokens have \(2, 5\)",
    ),
  ],
)
def test_mistakes_are_told_before_anything_compiles(
  models, monkeypatch, changes, message
):
  def refuse(*_, **__):
    raise AssertionError("compiled before the settings were checked")

  model = models("llada_tiny_A")
  monkeypatch.setattr(api, "_generate", refuse)
  with pytest.raises(ValueError, match=message):
    rspo_jax.generate(model, prompts_of(), **settings_of(**changes))


@pytest.mark.parametrize(
  "row,seen",
  [(0, [1, 1, 1, 1, 0]), (1, [0, 1, 0, 1, 1]), (1, [0, 0, 1, 1, 0])],
)
def test_prompts_padded_elsewhere_than_on_the_left_are_refused(
  models, monkeypatch, row, seen
):
  monkeypatch.setattr(api, "_generate", None)
  mask = np.ones((2, 5), int)
  mask[row] = seen
  place = {0: 4, 1: 2 if seen[1] else 4}[row]
  message = f"row {row} .*position {place}.* on the left"
  with pytest.raises(ValueError, match=message):
    rspo_jax.generate(
      models("llada_tiny_A"), prompts_of(), mask, **settings_of()
    )


def test_prompts_of_different_lengths_are_told_how_to_be_one_array(models):
  with pytest.raises(ValueError, match="prompts has rows of different lengths"):
    rspo_jax.generate(models("llada_tiny_A"), [[1, 2, 3], [4]], **settings_of())


def test_the_end_of_turn_token_comes_from_the_tokenizer(models, monkeypatch):
  words = build_word_tokenizer(["a", "<|eot_id|>"], r"<\|eot_id\|>|a")
  model = dataclasses.replace(models("llada_tiny_A"), tokenizer=words)
  seen = []

  def record(config, settings, ids, *rest):
    seen.append(ids)
    n = rest[1].shape
    return sampler.Denoised(rest[1], np.zeros(n), np.int32(0))

  monkeypatch.setattr(api, "_generate", record)
  rspo_jax.generate(
    model, prompts_of(), confidence_eos_eot_inf=True, **settings_of()
  )
  assert seen == [(500, 501, 1)]


# --- verify ------------------------------------------------------------------


def test_verify_reaches_the_task_and_its_protocols():
  example = {"ground_truth": [[3, 4, 5], 17], "solution": "3*4+5"}
  verdict = rspo_jax.verify("countdown", example, "<answer>3*4+5</answer>")
  assert verdict.correct is True
  assert verdict.reward == 1.0
  assert isinstance(verdict.parts, dict)
  wrong = rspo_jax.verify("countdown", example, "\x00 no answer")
  assert wrong.correct is False
  with pytest.raises(ValueError, match=r"countdown.*sudoku"):
    rspo_jax.verify("chess", example, "e4")
  with pytest.raises(ValueError, match="protocol"):
    rspo_jax.verify("countdown", example, "3", protocol="loose")
  with pytest.raises(ValueError, match=r"has no field .* task='countdown'"):
    rspo_jax.verify("countdown", {}, "3")
