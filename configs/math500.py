"""RSPO on MATH, competition problems with LaTeX answers, with a real checkpoint.

    python -m rspo_jax.main --config=configs/math500.py:llada_8b \\
        --config.model.path=LLADA --config.data.source=math_{split}.jsonl

Without `data.source` the published files are downloaded once. It holds rows with
problem and answer, or problem and solution with the answer in its last box;
`{split}` stands for train, validation and test.
Answers are compared by math-verify: pip install -r requirements-math.txt.

Arguments: as in configs/gsm8k.py.
"""

from configs import base, gsm8k


def get_config(arg: str = ""):
  """Returns the config of the MATH run."""
  config = base.get_config()
  gsm8k.real_model(config)
  config.task.name = "math500"
  config.sampler.steps = 256
  config.rollout.group_size = 16
  config.eval.prompts = 0  # all of the split: of test, 500
  gsm8k.SWITCHES["calibrated"](config)
  return base.apply(config, arg, gsm8k.SWITCHES)


def sweep():
  """The runs of launch/sweep.py: as for GSM8K."""
  return gsm8k.sweep()
