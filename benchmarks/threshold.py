"""Denoiser calls and accuracy of threshold decoding on a tiny model.

    python benchmarks/threshold.py --config=configs/sudoku.py [--model=FOLDER]

Completes validation prompts greedily, with the config's schedule and with
thresholds. A row's calls do not depend on the rows beside it, so one pass says
what a batch of any size takes: the most of its rows. Prints one JSON line a
setting: accuracy, and the mean calls of a batch of 1, 8 and 64.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
  """Prints one JSON line a setting."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--config", default="configs/sudoku.py")
  parser.add_argument("--model", default="", help="instead of the config's")
  parser.add_argument("--prompts", type=int, default=512)
  parser.add_argument("--thresholds", default="0.9,0.7,0.5")
  options = parser.parse_args()

  import numpy as np

  import rspo_jax
  from rspo_jax import tasks
  from rspo_jax.config import load
  from rspo_jax.run import data, settings

  config = load.load_config(options.config)
  if options.model:
    config.model.path = options.model
  run = settings.build(config, 1)
  task = tasks.TASKS[run.task.name]
  model = rspo_jax.load_model(run.model_folder)
  examples = data.load_examples(task, "validation", run.data)
  examples = [examples[i] for i in range(options.prompts)]
  found = data.Prompts(
    examples,
    lambda e: task.prompt(e, run.task.prompt_style),
    model.tokenizer.encode,
    run.data.prompt_length,
    model.config.pad_id,
  ).batch(np.arange(len(examples)))
  prompts, mask = found.tokens, found.mask
  sampler = dataclasses.replace(run.greedy, threshold=None)
  for threshold in (None, *map(float, options.thresholds.split(","))):
    out = rspo_jax.generate(
      model,
      prompts,
      mask,
      gen_length=sampler.completion_length,
      steps=sampler.steps,
      block_length=sampler.block_length,
      threshold=threshold,
      mask_policy="forbid",
    )
    right = 0
    for example, row in zip(examples, out.tokens, strict=True):
      ids = row[prompts.shape[1] :].tolist()
      if model.config.eos_id in ids:
        ids = ids[: ids.index(model.config.eos_id)]
      right += task.verify(example, model.tokenizer.decode(ids)).correct
    line = {
      "model": run.model["path"],
      "threshold": threshold,
      "accuracy": round(right / len(examples), 4),
    }
    if sampler.blocks == 1:
      calls = out.commit_step.max(axis=1) + 1
      for batch in (1, 8, 64):
        whole = calls[: len(calls) // batch * batch].reshape(-1, batch)
        line[f"calls_{batch}"] = round(float(np.mean(whole.max(axis=1))), 2)
    line["calls_all"] = out.denoiser_calls
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
  main()
