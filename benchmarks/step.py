"""How much of the machine's matmul speed a step reaches.

    python benchmarks/step.py --config=configs/countdown.py

1. Times a large float32 matmul (2048 x 2048 x 2048) in this process.
2. Times the compiled rollout and update of the config at its own shapes.
3. Divides useful FLOPs (no recomputation; two per multiply-add; the head at
   the rows that are needed) by time, and by the matmul's FLOP/s.

Everything runs interleaved, `--repeats` times; medians are reported, as one
JSON line. A guard against regressions on a quiet machine, not a boast.
"""

import argparse
import importlib.util
import json
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
  """Prints one JSON line."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--config", default="configs/countdown.py")
  parser.add_argument("--repeats", type=int, default=9)
  options = parser.parse_args()

  import jax
  import jax.numpy as jnp
  import numpy as np

  from rspo_jax import program as program_lib
  from rspo_jax import settings as settings_lib
  from rspo_jax import sharding, train_step
  from rspo_jax.flops import forward_flops

  path, _, arg = options.config.partition(":")
  spec = importlib.util.spec_from_file_location("config", ROOT / path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  settings = settings_lib.build(module.get_config(arg), jax.device_count())
  program = program_lib.build(settings)
  config = program.model.config
  length = settings.sampler.completion_length
  span = settings.prompt_length + length
  prompts = np.full(
    (settings.rollout.prompts, settings.prompt_length), 1, np.int32
  )
  tokens, mask = sharding.put_global(
    program.mesh, (prompts, np.ones(prompts.shape, bool))
  )
  key = train_step.stream_key(0, 0, train_step.ROLLOUT)
  matrix = jnp.ones((2048, 2048), jnp.float32)
  multiply = jax.jit(lambda a: a @ a)

  def roll():
    return program.rollout_fn(program.params, tokens, mask, key)

  out = roll()
  batch = program.present_fn(out)
  n = batch.tokens.shape[0]
  scores = program.estimate_fn(program.params, batch, key)
  batch = batch.replace(advantage=jnp.sin(jnp.arange(n, dtype=jnp.float32)))
  state = program_lib.fresh_state(program)

  def measure(fn):
    start = time.perf_counter()
    result = jax.block_until_ready(fn())
    return time.perf_counter() - start, result

  seconds = {"matmul": [], "rollout": [], "update": []}
  for _ in range(options.repeats + 1):
    seconds["matmul"].append(measure(lambda: multiply(matrix))[0])
    seconds["rollout"].append(measure(roll)[0])
    elapsed, (state, _) = measure(
      lambda state=state: program.update_fn(state, batch, key, scores, scores)
    )
    seconds["update"].append(elapsed)
  medians = {k: float(np.median(v[1:])) for k, v in seconds.items()}
  masks = settings.likelihood.masks
  draws = masks // settings.likelihood.draw_size
  flops = {
    "matmul": 2.0 * 2048**3,
    "rollout": settings.sampler.steps
    * forward_flops(config, n, span, n * settings.sampler.block_length),
    "update": 3.0 * forward_flops(config, n * masks, span, n * draws * length),
  }
  rates = {k: flops[k] / medians[k] / 1e9 for k in medians}
  line = {f"{k}_gflops_per_s": round(v, 1) for k, v in rates.items()}
  line |= {f"{k}_s": round(v, 4) for k, v in medians.items()}
  for name in ("rollout", "update"):
    line[f"{name}_share_of_matmul"] = round(rates[name] / rates["matmul"], 3)
  print(json.dumps(line))


if __name__ == "__main__":
  main()
