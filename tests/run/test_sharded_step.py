"""The step on eight devices against the loss as it is written down on one.

The oracle knows no mesh, no pieces of the batch, no rows and no adapter: full
weights, every logit of every position, a log-softmax, the objective's formula.
"""

import dataclasses
import itertools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_steps as steps

from rspo_jax.algorithm import likelihood, streams
from rspo_jax.algorithm.microbatches import StepSettings
from rspo_jax.algorithm.types import init_state
from rspo_jax.algorithm.update import make_estimate
from rspo_jax.devices import sharding
from rspo_jax.models import functions, lora, transformer
from rspo_jax.run import program as program_lib

# Divisible by every mesh below; one true token in five is the mask id itself.
CONFIG = dataclasses.replace(
  steps.CONFIG, vocab_size=16, mlp_width=32, remat=True
)
SETTINGS = lora.LoraSettings(rank=4, alpha=8.0)
MESHES = ((1, 8, 1), (2, 2, 2), (2, 4, 1), (1, 2, 4))
# (micro-batches, head pieces).
CUTS = ((1, 1), (2, 3), (4, 2))
TRAINED = ("full", "lora", "dual", "two")
EVERY = tuple(itertools.product(range(4), range(3), TRAINED))
# Each value of one choice meets several of the others.
PAIRS = ((0, 1, "full"), (1, 2, "full"), (1, 1, "dual"), (2, 0, "lora"))
PAIRS += ((3, 2, "two"),)
LAMBDA, TOTAL = 2.0, 4 * steps.N


def random_tree(shapes, seed, size=0.2):
  """Random leaves; norms around one."""
  rng = np.random.default_rng(seed)

  def one(path, leaf):
    values = rng.standard_normal(leaf.shape) * size
    return jnp.asarray(values + (path[-1].key == "scale"), jnp.float32)

  return jax.tree_util.tree_map_with_path(one, shapes)


def inputs():
  """Base, policy's and reference's adapters, batch."""
  key = jax.random.key(0)
  base = random_tree(jax.eval_shape(lambda: transformer.init(CONFIG, key)), 3)
  shapes = jax.eval_shape(lambda: lora.init(CONFIG, SETTINGS, key))
  adapters = [random_tree(shapes, seed, 0.1) for seed in (4, 5)]
  batches = [steps.batch_of(seed) for seed in range(4)]
  batch = jax.tree.map(lambda *x: jnp.concatenate(x), *batches)
  hide = np.random.default_rng(6).random(batch.tokens.shape) < 0.2
  tokens = jnp.where(hide, CONFIG.mask_id, batch.tokens)
  return base, *adapters, batch.replace(tokens=tokens, row=jnp.arange(TOTAL))


def masks_of(batch, key):
  """The masks that the step draws."""
  return likelihood.draw_masks(
    key, steps.MASKS, batch.completion_mask, steps.PROMPT
  )


def naive_scores(params, batch, masks):
  """Scores [N, K] from all logits of all canvases."""
  n, draws, canvases, span = masks.corrupt.shape
  tokens = jnp.where(masks.corrupt, CONFIG.mask_id, batch.tokens[:, None, None])
  seen = jnp.repeat(batch.token_mask, draws * canvases, axis=0)
  hidden = transformer.hidden(CONFIG, params, tokens.reshape(-1, span), seen)
  logits = transformer.project(CONFIG, params, hidden)
  logits = logits.reshape(n, draws, canvases, span, -1)
  true = jnp.broadcast_to(batch.tokens[:, None, None], tokens.shape)
  log_p = jnp.take_along_axis(
    jax.nn.log_softmax(logits), true[..., None], axis=-1
  )[..., 0].reshape(n, draws, -1)
  rows = jnp.take_along_axis(log_p, masks.rows, axis=2)
  return (masks.weight * rows[:, :, None]).sum(-1).reshape(n, -1)


def naive(policy_of, trained, reference, batch, key):
  """Loss and gradient of -mean gap * d, by the formula."""
  masks = masks_of(batch, key)
  frozen = naive_scores(reference, batch, masks).mean(1)

  def loss(trained):
    d = naive_scores(policy_of(trained), batch, masks).mean(1) - frozen
    groups = d.reshape(-1, steps.GROUP)
    d = (groups - jax.lax.stop_gradient(groups.mean(1, keepdims=True))).ravel()
    gap = jax.lax.stop_gradient(batch.advantage - LAMBDA * d)
    return -(gap * d).mean()

  return jax.jit(jax.value_and_grad(loss))(trained)


def on_mesh(shape, cut, kind, base, adapters, batch, key):
  """Loss and gradient of the step, laid out as the loop does it."""
  mesh = sharding.make_mesh(*shape)
  config = dataclasses.replace(CONFIG, head_chunks=cut[1])
  boxed = jax.eval_shape(
    lambda key: transformer.init(config, key, boxed=True), key
  )
  base = jax.device_put(base, sharding.shardings(mesh, boxed))
  trained, frozen = base, None
  reference = jax.tree.map(lambda x: x * 1.02, base)
  if kind != "full":
    boxed = jax.eval_shape(lambda key: lora.boxed(config, SETTINGS, key), key)
    adapters = jax.device_put(adapters, (sharding.shardings(mesh, boxed),) * 2)
    trained = adapters[0]
    frozen = lora.Adapted(base, None, adapters[1], SETTINGS.scale)
    reference = frozen.replace(adapter=adapters[1])
  step = StepSettings(
    TOTAL // cut[0],
    "two" if kind == "two" else "one",
    shards=sharding.batch_shards(mesh),
  )
  if kind != "two" and (TOTAL // cut[0] // step.shards) % steps.GROUP:
    step = dataclasses.replace(step, passes="two")
  one = functions.make_logprob_fn(config, mesh)
  both = functions.make_logprob_fn(config, mesh, dual=True)
  weighed = lambda fn: lambda params, *a: fn(lora.weights(params), *a)  # noqa: E731
  state = init_state(trained, optax.sgd(1.0))
  estimate = jax.jit(
    make_estimate(weighed(one), CONFIG.mask_id, step, steps.MASKS)
  )
  update = jax.jit(
    steps.make_update(
      step,
      steps.objective_of(lambda_=LAMBDA),
      logprob_fn=weighed(one),
      sequences=TOTAL,
      join=program_lib.joined,
      pair_fn=weighed(both) if kind == "dual" else None,
    ),
    out_shardings=(
      jax.tree.map(lambda x: x.sharding, state).replace(
        step=sharding.replicated(mesh)
      ),
      sharding.replicated(mesh),
    ),
  )
  batch = sharding.put_global(mesh, batch)
  scores = policy = None
  if kind != "dual" or step.passes == "two":
    scores = estimate(reference, batch, key)
  if step.passes == "two":
    policy = estimate(program_lib.joined(trained, frozen), batch, key)
  after, metrics = update(state, batch, key, scores, policy, None, frozen)
  gradient = jax.tree.map(jnp.subtract, trained, after.params)
  return float(metrics["loss"]), jax.device_get(gradient)


def agree(cases):
  """Compares cases with the oracle; run with eight devices."""
  jax.config.update("jax_disable_most_optimizations", True)
  base, policy, reference, batch = inputs()
  key = streams.stream_key(0, 0, streams.MASKS)
  merged = lambda adapter: lora.merge(base, adapter, SETTINGS.scale)  # noqa: E731
  wanted = {
    "full": naive(
      lambda params: params,
      base,
      jax.tree.map(lambda x: x * 1.02, base),
      batch,
      key,
    ),
    "adapted": naive(merged, policy, merged(reference), batch, key),
  }
  for mesh, cut, kind in cases:
    loss, gradient = wanted["full" if kind == "full" else "adapted"]
    found = on_mesh(
      MESHES[mesh], CUTS[cut], kind, base, (policy, reference), batch, key
    )
    case = (MESHES[mesh], CUTS[cut], kind)
    assert abs(found[0] - loss) <= 1e-6 * max(1.0, abs(loss)), (case, loss)
    steps.assert_close(gradient, found[1], 1e-5)
    print("agrees", *case, flush=True)


def run(selection):
  """`agree` in a process of its own, which has eight devices."""
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "PYTHONPATH": os.pathsep.join(
      str(pathlib.Path(__file__).resolve().parents[i]) for i in (1, 2)
    ),
  }
  done = subprocess.run(
    [sys.executable, __file__, selection],
    env=environment,
    capture_output=True,
    text=True,
    timeout=3000,
  )
  assert done.returncode == 0, done.stdout + done.stderr[-4000:]
  return done.stdout.count("agrees")


def test_eight_devices_give_the_loss_and_gradient_of_the_formula():
  assert run("pairs") == len(PAIRS)


@pytest.mark.slow
def test_eight_devices_give_them_in_every_combination():
  assert run("every") == len(EVERY)


if __name__ == "__main__":
  agree(PAIRS if sys.argv[1] == "pairs" else EVERY)
