"""A model of two matrices, its batches and its updates: a step in milliseconds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rspo_jax.algorithm import advantages as host
from rspo_jax.algorithm import likelihood, objectives, scoring
from rspo_jax.algorithm import update as update_lib
from rspo_jax.algorithm.microbatches import StepSettings
from rspo_jax.algorithm.types import RolloutBatch, init_state
from rspo_jax.models import transformer
from rspo_jax.models.families import ModelConfig

PROMPTS, GROUP, PROMPT, LENGTH = 4, 4, 3, 5


N, SPAN = PROMPTS * GROUP, PROMPT + LENGTH


VOCABULARY, MASK_ID = 12, 11


MASKS = likelihood.LikelihoodSettings("complementary", 4)


CONFIG = ModelConfig(
  family="llada",
  vocab_size=VOCABULARY,
  width=16,
  layers=2,
  heads=4,
  kv_heads=4,
  mlp_width=24,
  rope_theta=1e4,
  norm_eps=1e-5,
  mask_id=MASK_ID,
  eos_id=10,
  pad_id=9,
  max_length=16,
)


def tiny_logprob(params, tokens, token_mask, target, rows):
  """A model of two matrices: each row sees itself and the canvas's mean."""
  n, canvases, span = tokens.shape
  h = params["embed"]["embedding"][tokens]  # [n, C, S, D]
  seen = token_mask[:, None, :, None]
  mean = (h * seen).sum(2, keepdims=True) / jnp.maximum(seen.sum(2), 1)[:, None]
  h = jnp.tanh(h + mean + params["norm"]["scale"])
  h = jnp.take_along_axis(
    h.reshape(n, canvases * span, -1), rows[:, :, None], axis=1
  )
  logprob = jax.nn.log_softmax(h @ params["head"]["kernel"])
  return jnp.take_along_axis(logprob, target[:, :, None], axis=2)[:, :, 0]


def tiny_params(seed=0):
  """Random parameters of `tiny_logprob`."""
  a, b, c = jax.random.split(jax.random.key(seed), 3)
  return {
    "embed": {"embedding": jax.random.normal(a, (VOCABULARY, 6))},
    "norm": {"scale": jax.random.normal(b, (2, 3)).reshape(6)},
    "head": {"kernel": jax.random.normal(c, (6, VOCABULARY))},
  }


def transformer_params():
  """Parameters of CONFIG, larger than fresh ones; nothing is compiled."""
  shapes = jax.eval_shape(lambda: transformer.init(CONFIG, jax.random.key(0)))
  rng = np.random.default_rng(3)

  def one(path, leaf):
    values = rng.standard_normal(leaf.shape) * 0.2
    if path[-1].key == "scale":
      values += 1
    return jnp.asarray(values, jnp.float32)

  return jax.tree_util.tree_map_with_path(one, shapes)


def batch_of(seed=0, keep=None, normalize=True):
  """A random batch; lengths 1 .. L, left-padded prompts."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, 11, (N, SPAN))
  lengths = rng.integers(1, LENGTH + 1, N)
  scored = np.arange(LENGTH) < lengths[:, None]
  prompt = np.arange(PROMPT) >= rng.integers(0, PROMPT, N)[:, None]
  rewards = rng.random((PROMPTS, GROUP))
  advantage = host.group_advantages(rewards, normalize).reshape(-1)
  keep = np.ones(N) if keep is None else np.asarray(keep)
  return RolloutBatch(
    tokens=jnp.asarray(tokens, jnp.int32),
    token_mask=jnp.asarray(np.concatenate([prompt, scored], 1)),
    completion_mask=jnp.asarray(scored),
    advantage=jnp.asarray(advantage),
    target=jnp.asarray(advantage / 2.0),
    keep=jnp.asarray(keep, jnp.float32),
    row=jnp.arange(N),
  )


def objective_of(**options):
  """RSPO with lambda 2 nats per token unless said otherwise."""
  default = dict(lambda_=2.0, lambda_unit="token", group_size=GROUP)
  return objectives.ObjectiveSettings(
    **(default | dict(draw_size=MASKS.draw_size) | options)
  )


# Compiles in a fraction of the default generator's time.
KEY = jax.random.key(7, impl="unsafe_rbg")


@functools.cache
def estimate_of(micro_batch=N):
  """Jitted estimate of the tiny model."""
  settings = StepSettings(micro_batch)
  return jax.jit(
    update_lib.make_estimate(tiny_logprob, MASK_ID, settings, MASKS)
  )


def make_update(
  settings,
  objective,
  masks=MASKS,
  optimizer=None,
  rate=lambda count: 1.0,
  logprob_fn=tiny_logprob,
  sequences=N,
  **options,
):
  """`update.make_update` of these settings; descends by the gradient itself.

  Of (state, batch, key, reference, ...), with the settings' own lambda; returns
  (state, metrics).
  """
  plan = scoring.plan(
    objective,
    settings,
    masks.masks,
    sequences,
    shared_base=options.get("pair_fn") is not None,
  )
  update = update_lib.make_update(
    logprob_fn,
    MASK_ID,
    optimizer or optax.sgd(1.0),
    rate,
    settings,
    masks,
    objective,
    plan,
    **options,
  )

  def with_lambda(state, batch, *arguments, **more):
    return update(state, batch, objective.lambda_, *arguments, **more)[:2]

  return with_lambda


@functools.cache
def update_of(objective, micro_batch=N, passes="auto", shards=1):
  """Jitted update; plain descent of rate 1, so that params move by -grad."""
  settings = StepSettings(micro_batch, passes, shards=shards)
  return jax.jit(make_update(settings, objective)), optax.sgd(1.0)


def gradient_of(objective, batch, micro_batch=N, passes="auto", shards=1):
  """(gradient, metrics) of one update from other parameters than those of
  the reference."""
  update, optimizer = update_of(objective, micro_batch, passes, shards)
  params, estimate = tiny_params(), estimate_of()
  reference = estimate(tiny_params(1), batch, KEY)
  policy = estimate(params, batch, KEY)
  state = init_state(params, optimizer)
  after, metrics = update(state, batch, KEY, reference, policy)
  return jax.tree.map(lambda a, b: a - b, params, after.params), metrics


def assert_close(a, b, tolerance=1e-6):
  """Trees agree within a share of the norm of the first."""
  squares = lambda tree: sum(  # noqa: E731
    np.square(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(tree)
  )
  difference = jax.tree.map(
    lambda x, y: np.asarray(x, np.float64) - np.asarray(y, np.float64), a, b
  )
  assert squares(difference) ** 0.5 <= tolerance * squares(a) ** 0.5
