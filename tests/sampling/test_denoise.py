"""The driver against loops written by hand and its own invariants."""

import functools
import itertools

import jax
import jax.numpy as jnp
import naive_decoding
import numpy as np
import pytest
from naive_decoding import EOS, EOT, MASK, VOCAB

from rspo_jax.models import families, functions
from rspo_jax.models.cache import CACHES
from rspo_jax.sampling import denoise as driver
from rspo_jax.sampling import schedules
from rspo_jax.sampling.settings import SamplerSettings

pytestmark = pytest.mark.usefixtures("compiled_fast")


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
  return SamplerSettings(length, block, steps, **options)


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
  return driver.denoise(
    fn, params, canvas, token_mask, key, settings, rows=rows, **ids, **options
  )


def denoise(
  canvas, settings, params=None, token_mask=None, seed=0, rows=None,
  fn=fake_denoise_fn, **options,
):  # fmt: skip
  """`driver.denoise` of the fake model, compiled, results as numpy."""
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
  mask = driver.completion_mask(completion, EOS)
  assert mask.dtype == bool
  np.testing.assert_array_equal(mask, np.array(want, bool))


def test_a_threshold_above_one_commits_the_best_position_at_each_step():
  canvas = canvas_of(rows=2)
  out = denoise(canvas, settings_of(threshold=1.1))
  want = numpy_greedy(no_mask_tables(), canvas, length=12, block=4, steps=12)
  np.testing.assert_array_equal(out.tokens, want)
  np.testing.assert_array_equal(
    np.sort(out.commit_step, axis=1), np.tile(np.arange(12), (2, 1))
  )


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
  scored = np.asarray(driver.completion_mask(whole.tokens[:, 5:], EOS))
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
  *({"algorithm": name} for name in schedules.ALGORITHMS),
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
    scored = np.asarray(driver.completion_mask(out.tokens[:, 5:], EOS))
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


def test_one_compilation_serves_every_call():
  settings = settings_of()
  traces = []

  @jax.jit
  def run(params, canvas, key):
    traces.append(1)
    mask = jnp.ones(canvas.shape, bool)
    return driver.denoise(
      fake_denoise_fn, params, canvas, mask, key, settings, mask_id=MASK
    )

  for seed in range(3):
    run(no_mask_tables(), canvas_of(seed=seed), jax.random.key(seed))
  assert len(traces) == 1


# --- With the transformer: caches -------------------------------------------


def tiny_model(family="llada"):
  config, params = naive_decoding.tiny_model(family)
  return functions.make_denoise_fn(config), params


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
    full, _ = fn(params, canvas, mask, CACHES["none"](), start, 4)
    filled, cache = fn(params, canvas, mask, CACHES[kind](), start, 4)
    return full, filled, fn(params, canvas, mask, cache, start, 4)[0]

  full, filled, window = run(params, canvas, mask)
  np.testing.assert_allclose(filled, full, atol=1e-5)
  np.testing.assert_allclose(window, full, atol=2e-5)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_cached_window_sees_its_own_new_tokens(family):
  fn, params = tiny_model(family)
  canvas = canvas_of()
  mask = np.ones(canvas.shape, bool)
  dual = CACHES["dual"]()
  fill = jax.jit(lambda canvas: fn(params, canvas, mask, dual, 9, 4))
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
