"""The sampler against recordings, hand-made loops and its own invariants."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rspo_jax import sampler, sampler_settings
from rspo_jax.models import families, hf_weights, transformer

MASK, EOS, EOT, VOCAB = 29, 28, 27, 30

LLADA_CASES = (
  "v01_full_block", "v02_semi_ar", "v03_batch3_two_per_step",
  "v04_uneven_steps", "v05_uneven_blocks", "v06_cfg1", "v07_cfg05_batch",
  "v08_leftpad_batch", "v09_cfg_leftpad", "v10_gumbel", "v11_random_remask",
  "v12_steps_exceed_block", "v13_prompt_has_masks", "v14_logits_eos_inf",
  "v15_conf_eos_eot_inf", "v16_gqa", "v17_leftover_mask", "v20_fast_plain",
  "v21_fast_plain_thr", "v22_fast_prefix", "v23_fast_prefix_thr",
  "v24_fast_dual", "v25_fast_dual_thr", "v26_fast_dual_gqa_thr",
  "v27_fast_prefix_thr_low",
)  # fmt: skip
DREAM_CASES = (
  "d01_maskgit_plus", "d02_entropy", "d03_topk_margin_batch",
  "d04_entropy_leftpad", "d05_origin", "d06_entropy_topk_default",
  "d07_maskgit_topp",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def compile_fast():
  """Most of this file's time is compilation of tiny programs."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


# --- A denoiser that numpy can follow ---------------------------------------


@functools.cache
def tables(seed=0, width=12):
  """Random numbers of the fake model: tokens, places, output."""
  rng = np.random.default_rng(seed)
  return {
    "tokens": rng.normal(size=(VOCAB, width)).astype(np.float32),
    "places": rng.normal(size=(64, width)).astype(np.float32),
    "out": rng.normal(size=(width, VOCAB)).astype(np.float32),
  }


def fake_logits(xp, params, tokens, token_mask):
  """Logits [n, S, V] from the mean token and the place behind the padding."""
  seen = token_mask[..., None] * params["tokens"][tokens]
  mean = seen.sum(1) / token_mask.sum(1)[:, None]
  place = params["places"][xp.cumsum(token_mask, 1)]
  return xp.tanh(3 * mean[:, None] + place) @ params["out"] * 1.5


def fake_denoise_fn(params, tokens, token_mask, cache, start, length):
  logits = fake_logits(jnp, params, tokens, token_mask)
  return jax.lax.dynamic_slice_in_dim(logits, start, length, 1), cache


def no_mask_tables():
  """The fake model with MASK never and EOS seldom its best token."""
  params = dict(tables())
  params["out"] = params["out"].copy()
  params["out"][:, [MASK, EOS]] *= 1e-3
  return params


def settings_of(length=12, block=4, steps=6, **options):
  return sampler.SamplerSettings(length, block, steps, **options)


def canvas_of(rows=3, prompt=5, length=12, seed=0):
  rng = np.random.default_rng(seed)
  canvas = np.full((rows, prompt + length), MASK, np.int32)
  canvas[:, :prompt] = rng.integers(0, EOT, (rows, prompt))
  return canvas


@functools.partial(
  jax.jit, static_argnames=("fn", "settings", "first_block", "first_step")
)
def run_denoise(params, canvas, token_mask, key, rows, **options):
  fn, settings = options.pop("fn"), options.pop("settings")
  ids = {"mask_id": MASK, "eos_id": EOS, "eot_id": EOT}
  return sampler.denoise(
    fn, params, canvas, token_mask, key, settings, rows=rows, **ids, **options
  )


def denoise(
  canvas, settings, params=None, token_mask=None, seed=0, rows=None,
  fn=fake_denoise_fn, **options,
):  # fmt: skip
  """`sampler.denoise` of the fake model, compiled, results as numpy."""
  params = no_mask_tables() if params is None else params
  if token_mask is None:
    token_mask = np.ones(canvas.shape, bool)
  if rows is None:
    rows = np.arange(len(canvas))
  key = jax.random.key(seed)
  out = run_denoise(
    params, canvas, token_mask, key, rows, fn=fn, settings=settings, **options
  )
  return jax.tree.map(np.asarray, out)


def numpy_greedy(params, canvas, length, block, steps):
  """LLaDA's algorithm, one row and one position at a time."""
  canvas = canvas.copy()
  blocks = length // block
  block_steps = steps // blocks
  prompt = canvas.shape[1] - length
  for row, b in itertools.product(range(len(canvas)), range(blocks)):
    inside = range(prompt + b * block, prompt + (b + 1) * block)
    masks = sum(canvas[row, p] == MASK for p in inside)
    for step in range(block_steps):
      quota = masks // block_steps + (step < masks % block_steps)
      one = canvas[row : row + 1]
      logits = fake_logits(np, params, one, np.ones(one.shape, bool))[0]
      found = []
      for p in inside:
        if canvas[row, p] != MASK:
          continue
        e = np.exp(logits[p].astype(np.float64) - logits[p].max())
        token = max(
          (t for t in range(VOCAB) if t != MASK), key=lambda t: logits[p][t]
        )
        found.append((-e[token] / e.sum(), p, token))
      for _, p, token in sorted(found)[:quota]:
        canvas[row, p] = token
  return canvas


# --- Pieces -----------------------------------------------------------------


def test_completion_mask_ends_with_the_first_eos():
  completion = jnp.array(
    [
      [EOS, 1, 2, 3],
      [1, 2, 3, EOS],
      [1, 2, 3, 4],
      [1, EOS, EOS, 2],
    ]
  )
  want = [[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
  mask = sampler.completion_mask(completion, EOS)
  assert mask.dtype == bool
  np.testing.assert_array_equal(mask, np.array(want, bool))


def test_ranks_give_ties_to_the_lowest_index():
  confidence = jnp.array([[0.5, 0.9, 0.5, 0.9, -jnp.inf, -jnp.inf]])
  every = jnp.ones((1, 6), bool)
  found = sampler.ranks(confidence, every)
  np.testing.assert_array_equal(found, [[2, 0, 3, 1, 4, 5]])


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 13])
def test_quotas_are_even_with_the_remainder_first(steps):
  settings = settings_of(16, 16, steps)
  for masks in range(17):
    remaining = jnp.array([masks])
    spent = []
    for step in range(steps):
      quota = sampler.even_quota(remaining, step, None, settings)
      spent.append(int(quota[0]))
      remaining = remaining - quota
    base, rest = divmod(masks, steps)
    assert spent == [base + 1] * rest + [base] * (steps - rest)


def test_gumbel_argmax_draws_from_the_tempered_softmax():
  logits = np.array([1.0, 0.0, -1.0, 2.5], np.float32)
  temperature, draws = 0.7, 40_000
  uniform = jax.random.uniform(jax.random.key(0), (draws, 4))
  noise = sampler.gumbel(uniform)
  tokens = sampler.gumbel_argmax(jnp.asarray(logits), noise, temperature)
  share = np.bincount(tokens, minlength=4) / draws
  p = np.exp(logits / temperature)
  p /= p.sum()
  # Five standard errors of a share.
  assert (np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / draws)).all()


def test_the_best_noise_of_a_large_vocabulary_lies_on_no_grid():
  # Of V tokens the best has an exponential e = exp(-noise) of about 1 / V; in
  # steps of 2**-23 the tail of a distribution would be drawn too seldom.
  vocab, rows = 126_464, np.arange(32)
  noise = sampler._drawn(
    sampler._gumbel_draw, jax.random.key(6), sampler.TOKENS, 0, rows,
    np.arange(4), vocab,
  )  # fmt: skip
  best = np.asarray(jax.lax.top_k(noise.reshape(-1, vocab), 2)[0], np.float64)
  e = np.exp(-best)
  # e_1 V is exponential, and so is its distance to e_2 V: 256 numbers.
  waits = np.diff(e * vocab, axis=1, prepend=0).reshape(-1)
  for uniform in (np.exp(-waits), e.reshape(-1) * 2**23 % 1):
    counts = np.histogram(uniform, bins=8, range=(0, 1))[0]
    expected = len(uniform) / 8
    # One in 10,000 of the chi-squares with 7 degrees of freedom is above 29.9.
    assert ((counts - expected) ** 2 / expected).sum() < 29.9, counts


def test_gumbel_argmax_survives_logits_whose_exponential_overflows():
  logits = jnp.array([500.0, 499.0, -500.0])
  uniform = jnp.array([[0.01, 0.99, 0.5], [0.0, 0.5, 0.5]])
  # 500 - log(4.6) against 499 - log(.01); u = 0 is as low as noise can be.
  tokens = sampler.gumbel_argmax(logits, sampler.gumbel(uniform), 1.0)
  np.testing.assert_array_equal(tokens, [1, 1])


@pytest.mark.parametrize("top_p,top_k", [(0.6, None), (None, 3), (0.9, 2)])
def test_filters_keep_the_nucleus_and_then_the_k_best(top_p, top_k):
  logits = np.random.default_rng(1).normal(size=(20, 9)).astype(np.float32)
  out = np.asarray(sampler.filter_logits(jnp.asarray(logits), top_p, top_k))
  for row, filtered in zip(logits, out, strict=True):
    order = sorted(range(9), key=lambda t: -row[t])
    if top_p is not None:
      p = np.exp(row.astype(np.float64))
      p /= p.sum()
      before = np.cumsum([0.0] + [p[t] for t in order[:-1]])
      order = [
        t for t, mass in zip(order, before, strict=True) if mass <= top_p
      ]
    order = order[:top_k]
    kept = set(np.flatnonzero(filtered > -1e30))
    assert kept == set(order)
    np.testing.assert_array_equal(filtered[order], row[order])


def test_threshold_takes_all_that_reach_it_and_always_the_best():
  confidence = jnp.array([[0.9, 0.8, 0.3, 0.99], [0.1, 0.3, 0.2, 0.9]])
  eligible = jnp.array([[1, 1, 1, 0], [1, 1, 1, 0]], bool)
  settings = settings_of(threshold=0.8)
  chosen = sampler.select_by_threshold(confidence, eligible, None, settings)
  want = [[True, True, False, False], [False, True, False, False]]
  np.testing.assert_array_equal(chosen, want)


def test_a_threshold_above_one_commits_the_best_position_at_each_step():
  canvas = canvas_of(rows=2)
  out = denoise(canvas, settings_of(threshold=1.1))
  want = numpy_greedy(no_mask_tables(), canvas, length=12, block=4, steps=12)
  np.testing.assert_array_equal(out.tokens, want)
  np.testing.assert_array_equal(
    np.sort(out.commit_step, axis=1), np.tile(np.arange(12), (2, 1))
  )


@pytest.mark.parametrize("factor", [0.2, 1.0, 1.7])
def test_factor_scans_ranks_until_the_first_that_fails(factor):
  rng = np.random.default_rng(2)
  confidence = rng.uniform(0.3, 1, (200, 6)).astype(np.float32)
  eligible = rng.uniform(size=(200, 6)) < 0.7
  settings = settings_of(factor=factor)
  chosen = np.asarray(
    sampler.select_by_factor(
      jnp.asarray(confidence), jnp.asarray(eligible), None, settings
    )
  )
  for row in range(200):
    order = sorted(
      np.flatnonzero(eligible[row]), key=lambda p: -confidence[row, p]
    )
    count = min(1, len(order))
    while 0 < count < len(order) and confidence[
      row, order[count]
    ] >= 1 - factor / (count + 2):
      count += 1
    if count == len(order) - 1:
      count += 1  # the scan's last rank is taken whether it passes or not
    assert set(np.flatnonzero(chosen[row])) == set(order[:count])


@pytest.mark.parametrize("steps", [1, 7, 16, 100])
def test_dream_shares_reveal_everything_on_average(steps):
  shares = sampler.dream_shares(steps, 1e-3)
  assert shares.dtype == np.float32 and shares[-1] == 1
  times = np.linspace(1, 1e-3, steps + 1)
  want = 1 - times[1:] / times[:-1]
  np.testing.assert_allclose(shares[:-1], want[:-1], rtol=1e-4)


# --- Invariants of the whole loop -------------------------------------------

SCHEDULES = [
  {"length": 12, "block": 12, "steps": 12},
  {"length": 12, "block": 4, "steps": 6},
  {"length": 12, "block": 12, "steps": 5},
  {"length": 12, "block": 3, "steps": 20},
]


@pytest.mark.parametrize(
  "schedule,temperature", [*((s, 0.0) for s in SCHEDULES), (SCHEDULES[1], 1.0)]
)
def test_every_mask_is_filled_once_and_by_quota(schedule, temperature):
  canvas = canvas_of()
  settings = settings_of(**schedule, temperature=temperature)
  out = denoise(canvas, settings)
  np.testing.assert_array_equal(out.tokens[:, :5], canvas[:, :5])
  assert (out.tokens != MASK).all()
  assert int(out.denoiser_calls) == schedule["steps"]
  block, per_block = schedule["block"], settings.block_steps
  for row in out.commit_step:
    for b, steps in enumerate(row.reshape(-1, block)):
      base, rest = divmod(block, per_block)
      want = [base + (i < rest) for i in range(per_block)]
      counts = np.bincount(steps - b * per_block, minlength=per_block)
      assert counts.tolist() == want


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_greedy_equals_a_loop_written_by_hand(schedule):
  canvas = canvas_of()
  canvas[0, 7:9] = 3  # a partly filled completion
  canvas[2, 16] = EOS
  out = denoise(canvas, settings_of(**schedule))
  want = numpy_greedy(no_mask_tables(), canvas, **schedule)
  np.testing.assert_array_equal(out.tokens, want)
  assert (out.commit_step[0, 2:4] == -1).all() and out.commit_step[2, 11] == -1


def test_only_the_logits_of_the_current_block_are_asked_for():
  windows = []

  def recording(params, tokens, token_mask, cache, start, length):
    windows.append(length)
    return fake_denoise_fn(params, tokens, token_mask, cache, start, length)

  denoise(canvas_of(), settings_of(), fn=recording)
  assert set(windows) == {4}


def eager_mask_tables():
  """The fake model when it would rather stay masked, everywhere."""
  params = dict(tables())
  params["out"] = np.zeros_like(params["out"])

  def logits(params, tokens, token_mask, cache, start, length):
    out, cache = fake_denoise_fn(
      params, tokens, token_mask, cache, start, length
    )
    return out.at[..., MASK].set(50.0), cache

  return params, logits


def test_a_predicted_mask_is_never_placed_when_forbidden():
  params, fn = eager_mask_tables()
  for temperature in (0.0, 1.0):
    settings = settings_of(temperature=temperature)
    out = denoise(canvas_of(), settings, params, fn=fn)
    assert (out.tokens != MASK).all()


def test_a_predicted_mask_stays_masked_when_it_may_compete():
  params, fn = eager_mask_tables()
  for options in ({}, {"threshold": 0.5}):
    settings = settings_of(mask_policy="compete", **options)
    out = denoise(canvas_of(), settings, params, fn=fn)
    assert (out.tokens[:, 5:] == MASK).all()
    assert (out.commit_step == -1).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_rows_beside_a_row_do_not_change_it(temperature):
  canvas = canvas_of(rows=6)
  settings = settings_of(temperature=temperature)
  together = denoise(canvas, settings)
  some = np.array([4, 1])
  apart = denoise(canvas[some], settings, rows=some)
  np.testing.assert_array_equal(apart.tokens, together.tokens[some])
  np.testing.assert_array_equal(apart.commit_step, together.commit_step[some])


@pytest.mark.parametrize(
  "remasking,policy", [("low_confidence", "forbid"), ("random", "compete")]
)
def test_left_padding_changes_no_sample(remasking, policy):
  canvas = canvas_of()
  padded = np.pad(canvas, ((0, 0), (4, 0)), constant_values=EOS)
  mask = np.pad(np.ones(canvas.shape, bool), ((0, 0), (4, 0)))
  settings = settings_of(
    temperature=1.0, remasking=remasking, mask_policy=policy
  )
  plain = denoise(canvas, settings)
  out = denoise(padded, settings, token_mask=mask)
  np.testing.assert_array_equal(out.tokens[:, 4:], plain.tokens)
  np.testing.assert_array_equal(out.commit_step, plain.commit_step)


def test_keys_and_rows_and_positions_draw_differently():
  canvas = np.repeat(canvas_of(rows=1), 64, axis=0)
  settings = settings_of(temperature=1.5)
  first, second = (denoise(canvas, settings, seed=s).tokens for s in (0, 1))
  assert len({tuple(row) for row in first}) > 60
  assert (first != second).any(axis=1).mean() > 0.95
  np.testing.assert_array_equal(denoise(canvas, settings).tokens, first)


@pytest.mark.parametrize(
  "block,step,temperature", [(0, 1, 0.0), (1, 0, 1.0), (2, 1, 1.0)]
)
def test_a_run_started_in_the_middle_ends_like_the_whole(
  block, step, temperature
):
  canvas = canvas_of()
  settings = settings_of(12, 4, 9, temperature=temperature)
  whole = denoise(canvas, settings)
  done = whole.commit_step < block * settings.block_steps + step
  middle = canvas.copy()
  middle[:, 5:] = np.where(done, whole.tokens[:, 5:], MASK)
  rest = denoise(middle, settings, first_block=block, first_step=step)
  np.testing.assert_array_equal(rest.tokens, whole.tokens)


def ending_fn(params, tokens, token_mask, cache, start, length):
  """A fake model that is sure of EOS from the completion's place 5 on."""
  logits, cache = fake_denoise_fn(
    params, tokens, token_mask, cache, start, length
  )
  late = start + jnp.arange(length) >= 10
  return logits.at[..., EOS].add(jnp.where(late, 40.0, 2.0)), cache


@pytest.mark.parametrize("threshold", [None, 0.4])
def test_stopping_at_eos_keeps_the_scored_part_and_saves_calls(threshold):
  canvas = canvas_of(rows=8)
  options = {"temperature": 1.0, "threshold": threshold}
  run = functools.partial(denoise, canvas, fn=ending_fn)
  whole = run(settings_of(**options))
  stopped = run(settings_of(stop_at_eos=True, **options))
  scored = np.asarray(sampler.completion_mask(whole.tokens[:, 5:], EOS))
  assert not scored.all(axis=1).any(), "every row should end early here"
  got, want = stopped.tokens[:, 5:], whole.tokens[:, 5:]
  np.testing.assert_array_equal(got[scored], want[scored])
  assert (got[~scored] == EOS).all()
  assert (stopped.commit_step[~scored] == -1).all()
  assert int(stopped.denoiser_calls) < int(whole.denoiser_calls)


@pytest.mark.parametrize("options", [{"threshold": 0.25}, {"factor": 1.2}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_adaptive_rows_finish_by_themselves(options, temperature):
  canvas = canvas_of(rows=5)
  settings = settings_of(temperature=temperature, **options)
  together = denoise(canvas, settings)
  assert (together.tokens != MASK).all()
  calls = []
  for row in range(5):
    alone = denoise(canvas[row : row + 1], settings, rows=np.array([row]))
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
    calls.append(int(alone.denoiser_calls))
  assert max(calls) <= int(together.denoiser_calls) <= 12
  assert min(calls) < 12


@pytest.mark.parametrize("options", [{"threshold": 1.0}, {"factor": 0.1}])
def test_masks_of_a_prompt_do_not_profit_from_slower_rows(options):
  canvas = canvas_of(rows=5, prompt=14, length=4)
  canvas[:, 1:13] = MASK
  settings = settings_of(4, 4, 2, mask_policy="compete", **options)
  together = denoise(canvas, settings)
  left = []
  for row in range(5):
    alone = denoise(canvas[row : row + 1], settings, rows=np.array([row]))
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
    left.append(int((alone.tokens == MASK).sum()))
  assert max(left) > 0, "the block should be full before the prompt is"


def test_left_padding_changes_no_sample_of_adaptive_rows():
  canvas = canvas_of(rows=2)
  settings = settings_of(mask_policy="compete", temperature=1.0, threshold=0.3)
  padded = np.pad(canvas, ((0, 0), (4, 0)), constant_values=EOS)
  mask = np.pad(np.ones(canvas.shape, bool), ((0, 0), (4, 0)))
  plain = denoise(canvas, settings)
  out = denoise(padded, settings, token_mask=mask)
  np.testing.assert_array_equal(out.tokens[:, 4:], plain.tokens)


def test_the_names_of_the_settings_are_those_that_are_implemented():
  assert set(sampler_settings.ALGORITHMS) == set(sampler.ALGORITHMS)
  assert set(sampler_settings.REMASKING) == set(sampler.REMASKING)


@pytest.mark.parametrize(
  "algorithm", ["maskgit_plus", "topk_margin", "entropy", "origin"]
)
def test_dream_algorithms_fill_all_at_a_temperature(algorithm):
  settings = settings_of(
    12, 12, 5, algorithm=algorithm, temperature=0.9, top_p=0.9, top_k=8,
    order_temperature=0.5,
  )  # fmt: skip
  out = denoise(canvas_of(), settings)
  assert (out.tokens != MASK).all() and int(out.denoiser_calls) == 5
  assert ((out.commit_step >= 0) & (out.commit_step < 5)).all()


CANVASES = ("empty", "uneven", "ended")


def filled_canvas(kind, rows=16):
  """Canvases whose rows have unlike numbers of masks left, but for "empty"."""
  canvas = canvas_of(rows=rows)
  rng = np.random.default_rng(4)
  if kind == "uneven":
    given = rng.uniform(size=(rows, 12)) < np.linspace(0, 1, rows)[:, None]
    canvas[:, 5:][given] = rng.integers(0, EOT, int(given.sum()))
  elif kind == "ended":
    canvas[:-1, 5] = EOS  # all but the last row, which has everything to do
  return canvas


SCHEMES = [
  *({"algorithm": name} for name in sampler_settings.ALGORITHMS),
  {"threshold": 0.4},
  {"factor": 1.2},
]


@pytest.mark.parametrize(
  "scheme,stop,cache",
  [
    *((s, stop, "none") for s in SCHEMES for stop in (False, True)),
    ({"algorithm": "entropy"}, True, "prefix"),
    ({"algorithm": "topk_margin"}, True, "dual"),
    ({"threshold": 0.4}, True, "dual"),
  ],
  ids=str,
)
def test_a_completion_is_full_at_the_end(scheme, stop, cache):
  settings = settings_of(
    12, 6, 6, temperature=1.0, stop_at_eos=stop, cache=cache, **scheme
  )
  for kind in CANVASES:
    canvas = filled_canvas(kind)
    out = denoise(canvas, settings, fn=ending_fn)
    assert (out.tokens != MASK).all(), kind
    given = canvas != MASK
    scored = np.asarray(sampler.completion_mask(out.tokens[:, 5:], EOS))
    after = np.pad(~scored, ((0, 0), (5, 0))) & stop
    kept = given & ~after
    np.testing.assert_array_equal(out.tokens[kept], canvas[kept])
    assert (out.tokens[after] == EOS).all(), kind
    assert ((out.commit_step >= 0) == ~(given | after)[:, 5:]).all(), kind


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("algorithm", ["entropy", "origin"])
def test_rows_with_other_mask_counts_do_not_change_a_row(algorithm, stop):
  settings = settings_of(
    12, 12, 5, algorithm=algorithm, temperature=1.0, stop_at_eos=stop
  )
  canvas = filled_canvas("uneven")
  together = denoise(canvas, settings, fn=ending_fn)
  some = np.array([9, 2])
  apart = denoise(canvas[some], settings, rows=some, fn=ending_fn)
  np.testing.assert_array_equal(apart.tokens, together.tokens[some])
  np.testing.assert_array_equal(apart.commit_step, together.commit_step[some])


@pytest.mark.parametrize("steps", [1, 5, 12, 30])
def test_dream_quotas_of_rows_alike_are_those_of_the_batch_mean(steps):
  # The reference: floor(masks of the batch / rows * share), in float32.
  settings = settings_of(12, 12, steps, algorithm="entropy")
  shares = sampler.dream_shares(steps, settings.time_epsilon)
  for masks, step in itertools.product(range(13), range(steps)):
    eligible = np.tile(np.arange(12) < masks, (7, 1))
    mean = np.float32(eligible.sum()) / np.float32(7)
    want = np.floor(mean * shares[step])
    quota = sampler.ALGORITHMS["entropy"].quota(None, step, eligible, settings)
    np.testing.assert_array_equal(quota, np.full(7, want))


@pytest.mark.parametrize("order_temperature", [0.5, 1e-3])
def test_a_draw_of_nought_ranks_no_masked_position_behind_a_full_one(
  order_temperature,
):
  settings = settings_of(
    12, 12, 5, algorithm="entropy", order_temperature=order_temperature
  )
  draws = sampler._Draws(None, None, lambda: sampler.gumbel(jnp.zeros((2, 6))))
  drawn = sampler._drawn_order(jnp.ones((2, 6)), settings, draws)
  assert np.isfinite(drawn).all()
  eligible = np.array([[0, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 1]], bool)
  for confidence in (drawn, jnp.full((2, 6), -jnp.inf)):
    chosen = sampler.select_by_quota(
      confidence, eligible, np.array([2, 1]), settings
    )
    want = [[0, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0]]
    np.testing.assert_array_equal(chosen, np.array(want, bool))


def test_drawn_orders_follow_their_softmax():
  # One of three positions with confidences 0, 1, 2 at temperature 0.8.
  confidence = np.tile(np.arange(3, dtype=np.float32), (30_000, 1))
  settings = settings_of(12, 12, 5, algorithm="entropy", order_temperature=0.8)
  noise = jax.random.gumbel(jax.random.key(5), confidence.shape)
  draws = sampler._Draws(None, None, lambda: noise)
  drawn = sampler._drawn_order(jnp.asarray(confidence), settings, draws)
  share = np.bincount(np.argmax(drawn, axis=1), minlength=3) / len(confidence)
  p = np.exp(confidence[0] / 0.8)
  np.testing.assert_allclose(share, p / p.sum(), atol=0.015)


def test_one_compilation_serves_every_call():
  settings = settings_of()
  traces = []

  @jax.jit
  def run(params, canvas, key):
    traces.append(1)
    mask = jnp.ones(canvas.shape, bool)
    return sampler.denoise(
      fake_denoise_fn, params, canvas, mask, key, settings, mask_id=MASK
    )

  for seed in range(3):
    run(no_mask_tables(), canvas_of(seed=seed), jax.random.key(seed))
  assert len(traces) == 1


# --- With the transformer: caches -------------------------------------------


@functools.cache
def tiny_model(family="llada", kv_heads=2):
  config = families.ModelConfig(
    family=family, vocab_size=VOCAB, width=16, layers=2, heads=4,
    kv_heads=kv_heads, mlp_width=24, rope_theta=1e4, norm_eps=1e-6,
    mask_id=MASK, eos_id=EOS, pad_id=EOS, max_length=64,
    qkv_bias=family == "dream", logit_shift=family == "dream",
  )  # fmt: skip
  params = transformer.init(config, jax.random.key(3))
  # Logits of spread 1 or more: confidences far from ties.
  params = jax.tree.map(lambda x: x * 12 if x.ndim > 1 else x, params)
  return transformer.make_denoise_fn(config), params


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_a_window_over_unchanged_tokens_gives_the_full_logits(family, kind):
  fn, params = tiny_model(family)
  canvas = canvas_of()
  mask = np.ones(canvas.shape, bool)
  mask[0, :3] = False
  start = 9

  @jax.jit
  def run(params, canvas, mask):
    full, _ = fn(params, canvas, mask, None, start, 4)
    filled, cache = fn(params, canvas, mask, kind, start, 4)
    return full, filled, fn(params, canvas, mask, cache, start, 4)[0]

  full, filled, window = run(params, canvas, mask)
  np.testing.assert_allclose(filled, full, atol=1e-5)
  np.testing.assert_allclose(window, full, atol=2e-5)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_cached_window_sees_its_own_new_tokens(family):
  fn, params = tiny_model(family)
  canvas = canvas_of()
  mask = np.ones(canvas.shape, bool)
  fill = jax.jit(lambda canvas: fn(params, canvas, mask, "dual", 9, 4))
  step = jax.jit(lambda canvas, cache: fn(params, canvas, mask, cache, 9, 4))
  _, cache = fill(canvas)
  before, _ = step(canvas, cache)
  # Copies: an array in place would reach a call that still runs.
  inside, outside = canvas.copy(), canvas.copy()
  inside[:, 10] = 2
  after, _ = step(inside, cache)
  assert np.abs(after - before).max() > 1e-2
  outside[:, [10, 15]] = 2  # 15 is read as it was stored
  stale, _ = step(outside, cache)
  np.testing.assert_array_equal(stale, after)


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_a_cache_filled_at_every_step_changes_nothing(kind):
  fn, params = tiny_model()
  canvas = canvas_of()
  plain, cached = (
    denoise(canvas, settings_of(12, 6, 2, cache=c), params, fn=fn)
    for c in ("none", kind)
  )
  np.testing.assert_array_equal(cached.tokens, plain.tokens)
  assert int(cached.denoiser_calls) == 2


@pytest.mark.parametrize(
  "kind,family,options",
  [
    ("none", "llada", {}),
    ("none", "dream", {"threshold": 0.3}),
    ("prefix", "llada", {"threshold": 0.3}),
    ("dual", "llada", {"factor": 0.8}),
    ("dual", "dream", {}),
  ],
)
def test_neither_padding_nor_company_changes_a_decoded_row(
  kind, family, options
):
  fn, params = tiny_model(family)
  canvas = canvas_of(rows=3)
  mask = np.ones(canvas.shape, bool)
  mask[1, :3] = False
  settings = settings_of(cache=kind, **options)
  together = denoise(canvas, settings, params, mask, fn=fn)
  assert (together.tokens[:, 5:] != MASK).all()
  alone = denoise(canvas[1:2, 3:], settings, params, fn=fn)
  np.testing.assert_array_equal(together.tokens[1, 3:], alone.tokens[0])
  assert int(alone.denoiser_calls) <= int(together.denoiser_calls)


def test_cached_blocks_that_are_given_cost_no_call():
  fn, params = tiny_model()
  canvas = canvas_of()
  canvas[:, 5:11] = 4
  for kind in ("prefix", "dual"):
    settings = settings_of(12, 6, 6, cache=kind)
    out = denoise(canvas, settings, params, fn=fn)
    assert int(out.denoiser_calls) == 3
    np.testing.assert_array_equal(out.tokens[:, :11], canvas[:, :11])


# --- Recordings of the reference programs -----------------------------------


@functools.cache
def recorded_model(folder):
  model = hf_weights.load_model(folder)
  return transformer.make_denoise_fn(model.config), model.params


def recorded(shared, group, name):
  """One recorded case: its description, arrays, canvas and token mask."""
  folder = shared / "fixtures" / group
  cases = json.loads((folder / "cases.json").read_text())
  case = next(c for c in cases if c["name"] == name)
  arrays = np.load(folder / case["file"])
  options = case.get("effective", case["options"])
  length = options.get("gen_length", options.get("max_new_tokens"))
  mask_id = case.get("mask_id", case["options"].get("mask_token_id"))
  prompt = arrays["prompt"]
  canvas = np.pad(prompt, ((0, 0), (0, length)), constant_values=mask_id)
  token_mask = np.ones(canvas.shape, bool)
  if "attention_mask" in arrays:
    token_mask[:, : prompt.shape[1]] = arrays["attention_mask"] == 1
  model = recorded_model(shared / "fixtures" / "models" / case["model"])
  return case, options, arrays, canvas, token_mask, mask_id, model


def decode(model, canvas, token_mask, settings, noise=None, **ids):
  fn, params = model

  @jax.jit
  def run(params, canvas, token_mask, noise):
    return sampler.denoise(
      fn, params, canvas, token_mask, jax.random.key(0), settings,
      noise=noise, **ids,
    )  # fmt: skip

  with jax.default_matmul_precision("highest"):
    return jax.tree.map(np.asarray, run(params, canvas, token_mask, noise))


def canvas_before(call, canvas, out, prompt_length, mask_id):
  """The sequence that a call saw, from what was committed before it."""
  seen = canvas.copy()
  old = out.commit_step < call
  seen[:, prompt_length:] = np.where(
    old, out.tokens[:, prompt_length:], mask_id
  )
  return seen


@pytest.mark.parametrize("name", LLADA_CASES)
def test_recorded_llada_and_fast_dllm(shared, name):
  case, options, arrays, canvas, token_mask, mask_id, model = recorded(
    shared, "sampler", name
  )
  cache = {"fast_prefix": "prefix", "fast_dual": "dual"}
  settings = sampler.SamplerSettings(
    completion_length=options["gen_length"],
    block_length=options["block_length"],
    steps=options["steps"],
    temperature=options["temperature"],
    remasking=options["remasking"],
    cfg_scale=options.get("cfg_scale", 0.0),
    cache=cache.get(case["algo"], "none"),
    threshold=options.get("threshold"),
    mask_policy="compete",
    logits_eos_inf=options.get("logits_eos_inf", False),
    confidence_eos_eot_inf=options.get("confidence_eos_eot_inf", False),
  )
  noise = sampler.Noise(
    tokens=arrays.get("noise_logits"), positions=arrays.get("noise_pos")
  )
  if "uniform_noise" in arrays:
    uniform = arrays["uniform_noise"]
    field = "tokens" if uniform.ndim == 4 else "positions"
    noise = noise.replace(**{field: uniform})
  out = decode(
    model, canvas, token_mask, settings, noise, mask_id=mask_id,
    eos_id=case.get("eos_id"), eot_id=case.get("eot_id"),
  )  # fmt: skip
  np.testing.assert_array_equal(out.tokens, arrays["output"])
  assert int(out.denoiser_calls) == case["nfe"]
  prompt_length = case["prompt_len"]
  see = functools.partial(
    canvas_before, canvas=canvas, out=out, prompt_length=prompt_length,
    mask_id=mask_id,
  )  # fmt: skip
  for call, want in enumerate(arrays.get("steps_x", [])):
    got = see(call)[:, prompt_length:]
    np.testing.assert_array_equal(got, want[:, prompt_length:])
  block = -1
  for call, length in enumerate(arrays.get("call_lengths", [])):
    block += length == canvas.shape[1]
    seen = see(call)[0]
    if settings.cache == "dual" and length < len(seen):
      start = prompt_length + block * settings.block_length
      seen = seen[start : start + length]
    want = arrays["call_inputs_left_aligned"][call, :length]
    np.testing.assert_array_equal(seen[-length:], want)


@pytest.mark.parametrize("name", DREAM_CASES)
def test_recorded_dream(shared, name):
  case, options, arrays, canvas, token_mask, mask_id, model = recorded(
    shared, "dream_sampler", name
  )
  length = options["max_new_tokens"]
  settings = sampler.SamplerSettings(
    completion_length=length,
    block_length=length,
    steps=options["steps"],
    temperature=options["temperature"],
    algorithm=options["alg"],
    top_p=options["top_p"],
    top_k=options["top_k"],
    time_epsilon=options["eps"],
    order_temperature=options["alg_temp"] or 0.0,
    mask_policy="compete",
  )
  noise = sampler.Noise(masked=arrays.get("uniform_noise"))
  out = decode(model, canvas, token_mask, settings, noise, mask_id=mask_id)
  np.testing.assert_array_equal(out.tokens, arrays["output"])
  for step, want in enumerate(arrays["steps_x"]):
    seen = canvas_before(step + 1, canvas, out, case["prompt_len"], mask_id)
    np.testing.assert_array_equal(seen, want)


# --- Mistakes ---------------------------------------------------------------


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
    sampler.validate(settings_of(**options))


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
    sampler.check_call(settings_of(**options), **call)
