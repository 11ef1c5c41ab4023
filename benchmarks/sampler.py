"""How fast completions are sampled, against a matmul and plain PyTorch.

    python benchmarks/sampler.py [--repeats=7] [--rows=8] [--no_torch]

A random model (width 256, 6 layers, vocabulary 2,048) completes prompts of 64
tokens by 128, in 64 steps and blocks of 32, greedily:

1. `matmul`: a large float32 matmul (2048 x 2048 x 2048), the machine's peak.
2. `uncached`, `prefix`, `dual`: `rspo_jax.generate` on all rows together.
3. `one_row`: the dual cache on one row after the other, as Fast-dLLM does.
4. `torch`: benchmarks/torch_llada.py, where torch is installed.

All of them once a round, so that whatever disturbs the machine disturbs each;
a ratio is taken inside a round. Prints one JSON line: medians, and the quartiles
of each ratio. FLOPs are useful ones: two per multiply-add, the head at the rows
that are needed.
"""

import argparse
import json
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

PROMPT, COMPLETION, STEPS, BLOCK = 64, 128, 64, 32


def random_model():
  """A LLaDA of width 256 whose confidences are far from ties."""
  import jax

  from rspo_jax.models import checkpoints, families, transformer

  config = families.ModelConfig(
    family="llada",
    vocab_size=2048,
    width=256,
    layers=6,
    heads=8,
    kv_heads=8,
    mlp_width=768,
    rope_theta=5e5,
    norm_eps=1e-5,
    mask_id=2047,
    eos_id=2046,
    pad_id=2046,
    max_length=256,
  )
  params = transformer.init(config, jax.random.key(0))
  params = jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, params)
  return checkpoints.Model(config=config, params=params)


def flops(config, rows: int, cache: str) -> float:
  """Useful FLOPs of one call of `generate`."""
  from rspo_jax.planning.flops import forward_flops

  canvas = PROMPT + COMPLETION
  blocks = COMPLETION // BLOCK
  full = forward_flops(config, rows, canvas, rows * BLOCK)
  if cache == "none":
    return STEPS * full
  total = 0.0
  for block in range(blocks):
    rest = BLOCK if cache == "dual" else COMPLETION - block * BLOCK
    window = forward_flops(config, rows, rest, rows * BLOCK)
    # Its queries read the keys of the whole canvas.
    window += 4.0 * rows * rest * (canvas - rest) * config.layers * config.width
    total += full + (STEPS // blocks - 1) * window
  return total


def main() -> None:
  """Prints one JSON line."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--repeats", type=int, default=7)
  parser.add_argument("--rows", type=int, default=8)
  parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
  parser.add_argument("--no_torch", action="store_true")
  options = parser.parse_args()

  import jax
  import jax.numpy as jnp
  import numpy as np

  import rspo_jax

  model = random_model()
  config, rows = model.config, options.rows
  prompts = np.random.default_rng(0).integers(0, 2000, (rows, PROMPT))
  prompts = prompts.astype(np.int32)
  matrix = jnp.ones((2048, 2048), jnp.float32)
  multiply = jax.jit(lambda a: a @ a)

  def ours(cache, tokens):
    return rspo_jax.generate(
      model, tokens, gen_length=COMPLETION, steps=STEPS, block_length=BLOCK,
      cache=cache,
    ).tokens  # fmt: skip

  def one_row():
    parts = [ours("dual", prompts[i : i + 1]) for i in range(rows)]
    return np.concatenate(parts)

  runs = {
    "matmul": lambda: jax.block_until_ready(multiply(matrix)),
    "uncached": lambda: ours("none", prompts),
    "prefix": lambda: ours("prefix", prompts),
    "dual": lambda: ours("dual", prompts),
    "one_row": one_row,
  }
  if not options.no_torch:
    import torch
    import torch_llada

    torch.set_num_threads(options.threads)
    plain = torch_llada.Llada(config, jax.device_get(model.params))
    tokens = torch.tensor(prompts, dtype=torch.int64)
    runs["torch"] = lambda: torch_llada.generate(
      plain, tokens, COMPLETION, STEPS, BLOCK
    ).numpy()

  results = {name: np.asarray(run()) for name, run in runs.items()}
  seconds = {name: [] for name in runs}
  for _ in range(options.repeats):
    for name, run in runs.items():
      start = time.perf_counter()
      run()
      seconds[name].append(time.perf_counter() - start)
    print({k: round(v[-1], 3) for k, v in seconds.items()}, file=sys.stderr)
  seconds = {name: np.array(times) for name, times in seconds.items()}

  def quartiles(ratio):
    low, middle, high = np.percentile(ratio, (25, 50, 75))
    return [round(float(x), 3) for x in (middle, low, high)]

  peak = 2.0 * 2048**3 / seconds["matmul"]
  line = {
    f"{name}_s": round(float(np.median(t)), 4) for name, t in seconds.items()
  }
  line["peak_gflops_per_s"] = round(float(np.median(peak)) / 1e9, 1)
  for name, cache in (
    ("uncached", "none"),
    ("prefix", "prefix"),
    ("dual", "dual"),
  ):
    rate = flops(config, rows, cache) / seconds[name]
    line[f"{name}_share_of_peak"] = quartiles(rate / peak)
  pairs = [("uncached", "dual"), ("uncached", "prefix"), ("one_row", "dual")]
  if "torch" in runs:
    pairs += [("torch", "uncached"), ("torch", "dual")]
    same = results["torch"] == results["uncached"]
    line["tokens_as_torch"] = round(float(same.mean()), 4)
  for slow, fast in pairs:
    line[f"{slow}/{fast}"] = quartiles(seconds[slow] / seconds[fast])
  line["rows_alone_equal"] = bool((results["one_row"] == results["dual"]).all())
  print(json.dumps(line))


if __name__ == "__main__":
  main()
