"""RSPO on GSM8K, grade-school word problems, with a real checkpoint.

    python -m rspo_jax.main --config=configs/gsm8k.py:llada_8b \\
        --config.model.path=LLADA --config.data.source=gsm8k_{split}.jsonl

Without `data.source` the published files are downloaded once. It holds rows with
question and answer ("... #### 18"), their layout; `{split}` in it stands for
train, validation and test. Of a single file, as of the published training file,
one row in 16 is kept for validation.

Arguments: `smoke` (two small steps), `calibrated` (default: lambda 0.01 nats per
sequence), `paper_literal` (lambda 0.01 per token), `rft` (rejection sampling,
the control run), `d1` (that prompt format instead of espo's); `llada_8b` and
`dream_7b` (an adapter of rank 64 on the seven projections of a frozen bfloat16
base, ESPO's recipe otherwise), after either of them `full` (all parameters;
they and their moments in bfloat16); and, last, the objectives of
configs/recipes.py: `diffu_grpo`, `sapo`, `wd1`, `espo`, `spg`, `gdpo`, `vrpo`,
`tracerl`, `justgrpo`, `trafl`. What fits where: launch/plan.py.
"""

from configs import base, recipes


def _smoke(config):
  config.run.steps = 2
  config.run.checkpoint_every = 1
  config.rollout.prompts = 2
  config.train.micro_batch = 4
  config.sampler.completion_length = 64
  config.sampler.steps = 16
  config.eval.prompts = 4
  config.eval.batch = 4


def _calibrated(config):
  config.objective.lambda_, config.objective.lambda_unit = 0.01, "sequence"


def _paper_literal(config):
  config.objective.lambda_, config.objective.lambda_unit = 0.01, "token"


def _rft(config):
  config.objective.name = "rft"


def _d1(config):
  config.task.prompt_style = "d1"


def adapter(config):
  """A frozen base in bfloat16, adapted as ESPO does but at rank 64."""
  config.model.param_dtype = "bfloat16"
  config.lora.rank = 64
  config.lora.alpha = 64.0
  config.lora.targets = "query,key,value,out,gate,up,down"
  _calibrated(config)


def _llada_8b(config):
  config.model.published = "llada_8b"
  adapter(config)


def _dream_7b(config):
  config.model.published = "dream_7b"
  config.sampler.algorithm = "entropy"
  # ESPO's sampling of Dream, but in blocks, as everything here.
  config.sampler.top_p = 0.95
  adapter(config)


def full(config):
  """All parameters: ESPO's rate, decay and clipping where it does so too."""
  config.lora.rank = 0
  config.model.param_dtype = "bfloat16"
  config.optimizer.moment_dtype = "bfloat16"
  config.optimizer.learning_rate = 1e-6
  config.optimizer.weight_decay = 0.1
  config.optimizer.clip_norm = 0.8


SWITCHES = {
  "smoke": _smoke,
  "calibrated": _calibrated,
  "paper_literal": _paper_literal,
  "rft": _rft,
  "d1": _d1,
  "llada_8b": _llada_8b,
  "dream_7b": _dream_7b,
  "full": full,
  **recipes.SWITCHES,
}


def real_model(config):
  """What runs on general models share: ESPO's recipe, one update a rollout."""
  config.model.remat = True
  config.model.head_chunks = 8
  config.task.prompt_style = "espo"
  config.data.prompt_length = 512
  config.rollout.prompts = 16
  config.rollout.group_size = 6
  config.rollout.temperature = 1.0
  config.sampler.completion_length = 256
  config.sampler.block_length = 32
  config.sampler.steps = 128
  config.likelihood.scheme = "complementary"
  config.likelihood.masks = 4
  config.optimizer.learning_rate = 3e-6
  config.optimizer.warmup_steps = 10
  config.optimizer.b2 = 0.99
  config.optimizer.weight_decay = 0.01
  config.optimizer.clip_norm = 0.2
  config.train.micro_batch = 16
  config.eval.prompts = 256
  config.eval.batch = 64
  config.eval.every = 500
  config.run.steps = 10000
  config.run.checkpoint_every = 100


def get_config(arg: str = ""):
  """Returns the config of the GSM8K run."""
  config = base.get_config()
  real_model(config)
  config.task.name = "gsm8k"
  config.sampler.steps = 256
  _calibrated(config)
  return base.apply(config, arg, SWITCHES)


def sweep():
  """The runs of launch/sweep.py: RSPO and its controls over three seeds."""
  return [
    {"name": name, "overrides": overrides, "seeds": (0, 1, 2)}
    for name, overrides in {
      "rspo": {},
      "lambda_0": {"objective.lambda_": 0.0},
      "paper_literal": {"objective.lambda_unit": "token"},
      "rft": {"objective.name": "rft"},
    }.items()
  ]
