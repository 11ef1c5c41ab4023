"""How much of the machine's matmul speed a step reaches.

    python benchmarks/step.py --config=configs/countdown.py
    python benchmarks/step.py --model=85m --repeats=5

1. Times a large float32 matmul (2048 x 2048 x 2048) in this process.
2. Times the compiled rollout and update of the config at its own shapes; with
   `--model=85m` the update alone, of random weights (12 layers, width 768) on 8
   sequences x 2 masks x (64 + 64) tokens.
3. Divides useful FLOPs (no recomputation; two per multiply-add; the head at
   the rows that are needed) by time, and by the matmul's FLOP/s.

Everything runs interleaved, `--repeats` times; medians are reported, as one
JSON line. Shares are also taken pair by pair and by CPU time, which other
programs on the machine disturb less. `--profile=FOLDER` then traces one more
update and prints its most expensive operations. A guard against regressions on
a quiet machine, not a boast.
"""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def of_85m(config):
  """Settings and model of 85 million parameters beside the embedding's."""
  import jax

  from rspo_jax.models import checkpoints, transformer
  from rspo_jax.models.families import PUBLISHED
  from rspo_jax.run import settings as settings_lib

  config.rollout.prompts, config.rollout.group_size = 2, 4
  config.data.prompt_length = 64
  config.sampler.completion_length = config.sampler.block_length = 64
  config.sampler.steps = 64
  config.likelihood.masks = 2
  config.train.micro_batch = 8
  shape = dataclasses.replace(
    PUBLISHED["llada_8b"],
    vocab_size=8192,
    width=768,
    layers=12,
    heads=12,
    kv_heads=12,
    mlp_width=2048,
    mask_id=8191,
    eos_id=8190,
    pad_id=8190,
    max_length=128,
  )
  settings = settings_lib.build(config, jax.device_count())
  params = transformer.init(shape, jax.random.key(0))
  return settings, checkpoints.Model(config=shape, params=params)


def main() -> None:
  """Prints one JSON line."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--config", default="configs/countdown.py")
  parser.add_argument("--model", default="", choices=["", "85m"])
  parser.add_argument("--profile", default="", help="folder of a trace")
  parser.add_argument("--repeats", type=int, default=9)
  options = parser.parse_args()

  import jax
  import jax.numpy as jnp
  import numpy as np

  from rspo_jax.algorithm import streams
  from rspo_jax.algorithm.types import RolloutBatch
  from rspo_jax.devices import sharding
  from rspo_jax.planning.flops import forward_flops
  from rspo_jax.run import program as program_lib
  from rspo_jax.run import rollout
  from rspo_jax.run import settings as settings_lib

  path, _, arg = options.config.partition(":")
  spec = importlib.util.spec_from_file_location("config", ROOT / path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if options.model:
    settings, model = of_85m(module.get_config(arg))
    mesh = sharding.make_mesh(*settings.mesh.axes)
    program = program_lib.assemble(settings, model, mesh)
  else:
    settings = settings_lib.build(module.get_config(arg), jax.device_count())
    program = program_lib.build(settings)
  config = program.model.config
  length = settings.sampler.completion_length
  span = settings.data.prompt_length + length
  prompts = np.full(
    (settings.rollout.prompts, settings.data.prompt_length), 1, np.int32
  )
  tokens, mask = sharding.put_global(
    program.mesh, (prompts, np.ones(prompts.shape, bool))
  )
  key = streams.stream_key(0, 0, streams.ROLLOUT)
  side = 4096 if options.model else 2048
  matrix = jnp.ones((side, side), jnp.float32)
  multiply = jax.jit(lambda a: a @ a)
  n = settings.rollout.prompts * settings.rollout.group_size
  advantage = jnp.sin(jnp.arange(n, dtype=jnp.float32))

  def roll():
    return program.rollout_fn(program.reference, tokens, mask, key)

  if options.model:
    rng = np.random.default_rng(0)
    batch = RolloutBatch(
      tokens=jnp.asarray(rng.integers(0, 8000, (n, span)), jnp.int32),
      token_mask=jnp.ones((n, span), bool),
      completion_mask=jnp.ones((n, length), bool),
      advantage=advantage,
      target=advantage,
      keep=jnp.ones(n),
      row=jnp.arange(n),
    )
  else:
    found = rollout.before_rewards(
      settings.rollout.prompts, settings.rollout.group_size
    )
    batch = program.batch_fn(roll(), found).replace(advantage=advantage)
  scores = program.estimate_fn(program.reference, batch, key)
  state = program_lib.fresh_state(program)

  def measure(fn):
    start, busy = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(fn())
    taken = time.perf_counter() - start, time.process_time() - busy
    return taken, result

  def update(state):
    return program.update_fn(
      state, batch, settings.objective.lambda_, key, scores, scores
    )

  names = ("update",) if options.model else ("rollout", "update")
  seconds = {"matmul": [], **{name: [] for name in names}}
  for _ in range(options.repeats + 1):
    seconds["matmul"].append(measure(lambda: multiply(matrix))[0])
    if "rollout" in names:
      seconds["rollout"].append(measure(roll)[0])
    taken, (state, *_) = measure(lambda state=state: update(state))
    seconds["update"].append(taken)
  # [name][repeat] -> (wall, CPU); the first one compiles.
  seconds = {name: np.array(taken)[1:] for name, taken in seconds.items()}
  medians = {k: float(np.median(v[:, 0])) for k, v in seconds.items()}
  masks = settings.likelihood.masks
  draws = masks // settings.likelihood.draw_size
  flops = {
    "matmul": 2.0 * side**3,
    "rollout": settings.sampler.steps
    * forward_flops(config, n, span, n * settings.sampler.block_length),
    "update": 3.0 * forward_flops(config, n * masks, span, n * draws * length),
  }
  rates = {k: flops[k] / medians[k] / 1e9 for k in medians}
  line = {f"{k}_gflops_per_s": round(v, 1) for k, v in rates.items()}
  line |= {f"{k}_s": round(v, 4) for k, v in medians.items()}
  for name in names:
    ratio = seconds["matmul"] / seconds[name] * flops[name] / flops["matmul"]
    shares = [round(float(x), 3) for x in np.median(ratio, axis=0)]
    line[f"{name}_share_of_matmul"] = round(rates[name] / rates["matmul"], 3)
    line[f"{name}_share_in_pairs"], line[f"{name}_share_by_cpu"] = shares
  print(json.dumps(line))
  if options.profile:
    trace(options.profile, lambda: update(state))


def trace(folder: str, fn) -> None:
  """Prints the most expensive operations of one more call."""
  import jax

  from rspo_jax.reporting import profiler

  with jax.profiler.trace(folder):
    jax.block_until_ready(fn())
  for row in profiler.costs(pathlib.Path(folder), 1):
    print(*row.values(), sep=" | ")


if __name__ == "__main__":
  main()
