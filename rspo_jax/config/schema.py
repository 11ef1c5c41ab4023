"""Every key of a run, said once: default, meaning, allowed values.

A group of keys is a frozen dataclass, a key one of its fields (`keys.key`).
Everything else that must know the keys reads it here: `configs/base.py` makes
the ConfigDict of them, `run/settings.py` checks their values and cuts them
into settings, `docs/configs.md` prints them, and `config/identity.py` asks
which of them may differ between the parts of one run. The settings of the
rooms below (objectives, likelihood, optimizer, update) are these dataclasses
with what a run derives from them.

To add a key, add a line here and read it where it acts.
"""

import dataclasses
from collections.abc import Mapping

from rspo_jax.config import keys
from rspo_jax.config.keys import key

DTYPES = ("float32", "bfloat16")
LAMBDA_UNITS = ("token", "sequence")
CENTRINGS = ("group", "batch", "none")
GAP_MASKS = ("shared", "leave_one_out")

# A key is a line or a paragraph: default, meaning, rules.
# fmt: off


@dataclasses.dataclass(frozen=True)
class NewModel:
  """The shape of a model that is made from nothing, where model.path is ""."""

  width: int = key(96, "D", above=0)
  layers: int = key(4, "number of layers", above=0)
  heads: int = key(3, "query heads", above=0)
  kv_heads: int = key(3, "key and value heads", above=0)
  mlp_width: int = key(256, "inner width of the MLP", above=0)
  rope_theta: float = key(10000.0, "base of the rotary frequencies", above=0)
  norm_eps: float = key(1e-5, "added to the variance in a norm", above=0)
  max_length: int = key(64, "longest sequence, tokens", above=0)
  vocabulary: str = key("0 1 2 3 4",
    "pieces of text, separated by spaces; \\s is a space, \\n a new line")
  pattern: str = key(".", "regular expression of a piece")


@dataclasses.dataclass(frozen=True)
class Model:
  """Where the model comes from and how it computes."""

  path: str = key("",
    'checkpoint folder in the Hugging Face layout, or "embedded:NAME" for one '
    'that the package carries; "" trains a new model (supervised runs only)')
  published: str = key("",
    "key of rspo_jax.models.families.PUBLISHED: the shape that "
    'launch/plan.py takes while path is ""',
    table="models.families:PUBLISHED")
  compute_dtype: str = key("auto",
    "auto (float32 on CPU, else bfloat16) | float32 | bfloat16: dtype of "
    "matmul inputs", choices=("auto", *DTYPES))
  param_dtype: str = key("float32",
    "float32 | bfloat16: storage of parameters; bfloat16 ones are rounded "
    "stochastically", choices=DTYPES)
  attention: str = key("einsum",
    "einsum | flash: scores are never held; splash kernel on TPU (heads of a "
    "multiple of 128), cuDNN on GPU (bfloat16), XLA's form elsewhere; from "
    "about 1,024 tokens on", choices=("einsum", "flash"))
  remat: bool = key(False, "recompute layer activations in the backward pass")
  head_chunks: int = key(1,
    "pieces in which the vocabulary head is evaluated", at_least=1)
  new: NewModel = NewModel()


@dataclasses.dataclass(frozen=True)
class Lora:
  """The adapter that is trained on a frozen base."""

  rank: int = key(0,
    "columns of the adapter's A; 0: all parameters are trained", at_least=0)
  alpha: float = key(64.0, "the adapter's scale is alpha / rank", at_least=0)
  targets: str = key("query,key,value,out,gate,up,down",
    "adapted projections, of rspo_jax.models.lora.TARGETS")
  rslora: bool = key(False, "scale alpha / sqrt(rank)")
  path: str = key("",
    "adapter folder (PEFT's layout, or gs://) that the run starts from, its "
    "reference too; rank, alpha and targets are then the folder's")
  dual: bool = key(True,
    "policy and reference in one pass over the frozen base; False: the "
    "reference alone, while the host verifies")
  merge_dtype: str = key("stored",
    "stored (model.param_dtype) | float32: of model/, the base with the "
    "adapter added", choices=("stored", "float32"), free=True)


@dataclasses.dataclass(frozen=True)
class Task:
  """What is asked of the model and how its answer is judged."""

  name: str = key("countdown",
    "key of rspo_jax.tasks.TASKS, reasoning_gym:NAME (rspo_jax/tasks/gym.py), "
    "or module:function (rspo_jax/tasks/own.py)")
  prompt_style: str = key("compact", "template of the prompt")
  protocol: str = key("strict",
    "strict | d1 (bug-compatible)", table="tasks.base:PROTOCOLS")
  reward_weights: Mapping[str, float] = key({},
    "part -> weight; empty: the task's own")


@dataclasses.dataclass(frozen=True)
class Reward:
  """Functions of the user's that judge completions."""

  extra: str = key("",
    "module:function whose score is added to the reward, times "
    "task.reward_weights.extra")
  workers: int = key(2,
    "processes that call it, or a task that is a function",
    at_least=1, free=True)
  time_limit_s: float = key(5.0,
    "of one call, then its completion gets no reward", above=0)
  memory_mb: int = key(2048, "of one process", at_least=1, free=True)


@dataclasses.dataclass(frozen=True)
class Data:
  """Which rows are read, and how prompts are cut to size."""

  size: str = key("small",
    "small | large: builder config of a generated task",
    choices=("small", "large"))
  seed: int = key(0, "of the generated data", at_least=0)
  dir: str = key("",
    'prepared datasets; "": RSPO_JAX_DATA or a folder in ~/.cache', free=True)
  source: str = key("",
    "JSONL or CSV file read instead of a prepared or downloaded dataset; "
    "{split} in its path stands for train, validation, test; NAME:PATH is a "
    "published test file by name (rspo_jax/datasets/published.py)")
  prompt_length: int = key(7,
    "P: static, shorter prompts are left-padded", at_least=1)
  long_prompts: str = key("refuse",
    "refuse | keep_tail: a prompt of more tokens",
    choices=("refuse", "keep_tail"))
  corrupt_share: float = key(0.0,
    "demonstrations replaced by mixed-quality ones (supervised runs)",
    at_least=0, at_most=1)


@dataclasses.dataclass(frozen=True)
class Rollout:
  """How the completions of a step come about."""

  prompts: int = key(48, "B: prompts of one step, over all devices", at_least=1)
  group_size: int = key(8, "G: completions of one prompt", at_least=1)
  temperature: float = key(1.0, "of the training rollouts", at_least=0)
  stale_steps: int = key(0,
    "0 | 1: with 1 the completions of a step are sampled before the update of "
    "the step before it, while the host verifies that one's; for objectives "
    "that stay right on them (docs/method.md)", at_least=0, at_most=1)
  keep_groups: int = key(0,
    "groups with unequal rewards that a step takes at most: with more prompts "
    "than that, batches are full of them; 0: all", at_least=0)


@dataclasses.dataclass(frozen=True)
class Sampler:
  """How a completion is denoised, in training and evaluation."""

  completion_length: int = key(8, "L: static", at_least=1)
  block_length: int = key(8,
    "positions filled before the next block starts", at_least=1)
  steps: int = key(8,
    "T: denoising steps of all blocks together; 0: L", at_least=0)
  algorithm: str = key("llada",
    "key of rspo_jax.sampling.schedules.ALGORITHMS",
    table="sampling.settings:ALGORITHMS")
  remasking: str = key("low_confidence",
    "key of rspo_jax.sampling.proposals.REMASKING",
    table="sampling.settings:REMASKING")
  cache: str = key("none",
    "none | prefix | dual: keys and values that a block's later steps read "
    "instead of computing them", table="sampling.settings:CACHES")
  threshold: float = key(0.0,
    "commit all that are at least this probable; 0: off", at_least=0)
  factor: float = key(0.0,
    "commit rank r while p >= 1 - factor / (r + 2); 0: off", at_least=0)
  stop_at_eos: bool = key(False, "nothing more is sampled behind a first EOS")
  cfg_scale: float = key(0.0, "classifier-free guidance; 0: off", at_least=0)
  top_p: float = key(1.0,
    "nucleus of Dream's algorithms; 1: all", at_least=0, at_most=1)
  top_k: int = key(0,
    "best tokens kept by Dream's algorithms; 0: all", at_least=0)
  order_temperature: float = key(0.0,
    "of the order of Dream's positions; 0: best", at_least=0)


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """How completions are scored: masks and what they hide."""

  scheme: str = key("complementary",
    "key of rspo_jax.algorithm.likelihood.ESTIMATORS",
    table="algorithm.masks:ESTIMATORS")
  masks: int = key(2,
    "K: masks (forward passes) of a completion; 0 with scheme trace: as many "
    "as the sampler has steps", at_least=0)
  scope: str = key("completion",
    "completion (through the first EOS, later positions hidden from "
    "attention) | canvas (all L) | masked_tail (as completion, later "
    "positions seen as masks)", table="algorithm.likelihood:SCOPES")
  block_length: int = key(0, "of block_random; 0: the sampler's", at_least=0)
  prompt_mask: float = key(0.15,
    "probability that mean_field hides a prompt token, block_random one of "
    "prompt and earlier blocks", at_least=0, below=1)
  shrink: int = key(1,
    "sampling steps that share a canvas of trace", at_least=1)


@dataclasses.dataclass(frozen=True)
class Gdpo:
  """Options of the objective `gdpo`."""

  ratio_norm: str = key("none",
    "none | length: the log-ratio of a sequence, or that per token",
    choices=("none", "length"))


@dataclasses.dataclass(frozen=True)
class Sapo:
  """Options of the objective `sapo`."""

  finishes: int = key(1, "completions of each partial canvas", at_least=1)


@dataclasses.dataclass(frozen=True)
class Spg:
  """Options of the objective `spg`."""

  negative_score: str = key("mix",
    "mix | eubo | elbo | none: score of completions with A < 0",
    choices=("mix", "eubo", "elbo", "none"))
  bound_mix: float = key(0.5,
    "share of the upper bound in the mixture", at_least=0, at_most=1)
  bound_power: float = key(1.5, "exponent of the upper bound", above=0)


@dataclasses.dataclass(frozen=True)
class Tracerl:
  """Options of the objective `tracerl`."""

  kl_reduction: str = key("mean",
    "mean | sum, of the pull to the old policy within a step",
    choices=("mean", "sum"))


@dataclasses.dataclass(frozen=True)
class Trafl:
  """Options of the objective `trafl`."""

  beta: float = key(1.0, "inverse temperature", above=0)


@dataclasses.dataclass(frozen=True)
class Vrpo:
  """Options of the objective `vrpo`."""

  beta: float = key(1.0, "inverse temperature", above=0)
  pairs: str = key("all",
    "all | extremes: every pair of a better and a worse reward in a group, or "
    "the best against the worst", choices=("all", "extremes"))
  sft_weight: float = key(0.0, "weight of the winner's score", at_least=0)


@dataclasses.dataclass(frozen=True)
class Objective:
  """What an update minimises."""

  name: str = key("rspo",
    "key of rspo_jax.algorithm.objectives.OBJECTIVES",
    table="algorithm.objectives:OBJECTIVES")
  lambda_: float = key(0.01,
    "temperature of the KL-regularised problem", at_least=0)
  lambda_unit: str = key("sequence",
    "token | sequence: lambda meets nats per token or per sequence",
    choices=LAMBDA_UNITS)
  lambda_share: float = key(0.0,
    "share of the advantage's std that lambda follows from lambda_ on "
    "(gap/lambda_share); 0: it stays", at_least=0)
  centring: str = key("group",
    "group | batch | none: set over which the mean relative score is taken "
    "out", choices=CENTRINGS)
  subtract_reference: bool = key(True, "False: the gap forgets the reference")
  gap_masks: str = key("shared",
    "shared | leave_one_out: the gap that multiplies a draw is computed with "
    "all draws, or without that one", choices=GAP_MASKS)
  normalize_advantages: bool = key(True, "divide by the group's std (ddof 1)")
  skip_equal_groups: bool = key(False, "drop groups whose rewards are equal")
  solved_advantage: float = key(0.0,
    "of completions of a group that are all right and equally rewarded, for "
    "rspo; 0: nothing is learnt from it (paper)", at_least=0)
  reference_every: int = key(0,
    "steps after which the policy becomes the reference; 0: never", at_least=0)
  clip: float = key(0.2,
    "half-width of the ratio's trust region, for objectives that have a ratio",
    at_least=0)
  kl_weight: float = key(0.0,
    "pull to the reference (tracerl: old policy), for objectives that have "
    "one", at_least=0)
  gdpo: Gdpo = Gdpo()
  sapo: Sapo = Sapo()
  spg: Spg = Spg()
  tracerl: Tracerl = Tracerl()
  trafl: Trafl = Trafl()
  vrpo: Vrpo = Vrpo()


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW and its schedule."""

  learning_rate: float = key(1e-4, "peak", at_least=0)
  schedule: str = key("constant",
    "constant | linear | cosine", table="algorithm.optimizer:SCHEDULES")
  warmup_steps: int = key(0, "updates until the peak", at_least=0)
  final_share: float = key(0.0,
    "last rate / peak, for linear and cosine", at_least=0, at_most=1)
  b1: float = key(0.9, "decay of the first moment", at_least=0, below=1)
  b2: float = key(0.99, "decay of the second moment", at_least=0, below=1)
  eps: float = key(1e-8, "added to the root of the second moment", above=0)
  weight_decay: float = key(0.0, "of matrices", at_least=0)
  clip_norm: float = key(1.0, "global gradient norm", above=0)
  moment_dtype: str = key("float32",
    "float32 | bfloat16: storage of moments, and of a step's sum of gradients "
    "(that of float32 parameters: float32)", choices=DTYPES)


@dataclasses.dataclass(frozen=True)
class Train:
  """How an update is cut into pieces."""

  micro_batch: int = key(32,
    "sequences of one forward-backward, over all devices", at_least=1)
  passes: str = key("auto",
    "auto | one | two", table="algorithm.microbatches:PASSES")
  micro_masks: int = key(0,
    "masks of each of them in it, whole draws (pairs with complementary), "
    "then in two passes; 0: all", at_least=0)
  updates_per_rollout: int = key(1,
    "mu: updates on one rollout, masks redrawn", at_least=1)


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Shape of the device mesh."""

  data: int = key(1, "replicas; -1: what the other axes leave", free=True)
  fsdp: int = key(-1,
    "shards of parameters and batch; -1: what the others leave", free=True)
  tensor: int = key(1, "shards of heads, mlp and vocabulary", free=True)
  rollout_tensor: int = key(0,
    "sampling alone: parameters are laid out once a step over so many devices "
    "(heads, mlp, vocabulary) and copied to the others; 0: gathered for every "
    "forward from where training has them", at_least=0, free=True)

  @property
  def axes(self) -> tuple[int, int, int]:
    """Sizes of the axes (data, fsdp, tensor), -1 where one is to be found."""
    return self.data, self.fsdp, self.tensor


@dataclasses.dataclass(frozen=True)
class Eval:
  """What is evaluated; the lists count in --mode=eval alone."""

  split: str = key("validation",
    "train | validation | test", table="tasks.base:SPLITS")
  prompts: int = key(2048, "the first ones of the split; 0: all", at_least=0)
  completion_length: int = key(0,
    "L of evaluation; 0: the sampler's", at_least=0)
  block_length: int = key(0, "0: the sampler's", at_least=0)
  steps: int = key(0,
    "0: the sampler's steps, scaled with the length", at_least=0)
  batch: int = key(256, "prompts decoded together", at_least=1)
  temperature: float = key(1.0, "of eval/accuracy_sampled", at_least=0)
  every: int = key(0,
    "also every so many steps; 0: before and after only", at_least=0)
  samples: int = key(1,
    "completions of a prompt at that temperature; with several pass@k is "
    "reported too", at_least=1)
  completion_lengths: str = key("",
    'such as "128,256,512": --mode=eval makes one evaluation of each '
    'combination of these lists; "": the one above')
  samplers: str = key("",
    'such as "llada,llada+dual+threshold=0.9,entropy"; "": as in group '
    "sampler")
  seeds: str = key("", 'such as "0,1,2"; "": run.seed')
  d1_files: bool = key(False,
    "--mode=eval also writes completions as d1's program does")


@dataclasses.dataclass(frozen=True)
class Run:
  """Length, seed and outputs of a run."""

  steps: int = key(100, "steps of the whole run", at_least=1)
  seed: int = key(0, "of every stream of the run", at_least=0)
  checkpoint_every: int = key(50,
    "steps; the last step is always saved", at_least=1, free=True)
  keep_checkpoints: int = key(2, "newest ones", at_least=1, free=True)
  keep_best: int = key(0,
    "also those of highest eval/accuracy; every evaluated step is then saved",
    at_least=0, free=True)
  keep_every: int = key(0,
    "also those of steps that this divides; 0: none", at_least=0, free=True)
  non_finite_limit: int = key(3,
    "steps in a row that are not finite before the run stops; 0: it never "
    "does", at_least=0, free=True)
  collapse_window: int = key(10,
    "steps over which a collapse is looked for; 0: none", at_least=0, free=True)
  grace_s: float = key(300.0,
    "from a signal to the end, saved or not; 0: no limit",
    at_least=0, free=True)
  accept_changes: bool = key(False,
    "go on though the config means something else now", free=True)
  samples_every: int = key(25,
    "steps between samples/ files; 0: evaluations only", at_least=0, free=True)
  tensorboard: bool = key(True, "also write event files", free=True)
  logger: str = key("",
    'wandb | trackio | both with a comma; "": neither', free=True)
  profile: int = key(0,
    "steps of which a JAX profile is written, after the first",
    at_least=0, free=True)
  export: bool = key(True, "write model/ at the end", free=True)
  compilation_cache: str = key("auto",
    'folder; auto: in ~/.cache; "": none', free=True)
  log: str = key("normal",
    "quiet | normal | debug", choices=("quiet", "normal", "debug"), free=True)


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole config; fields are the groups, in the order of the docs."""

  model: Model = Model()
  lora: Lora = Lora()
  task: Task = Task()
  reward: Reward = Reward()
  data: Data = Data()
  rollout: Rollout = Rollout()
  sampler: Sampler = Sampler()
  likelihood: Likelihood = Likelihood()
  objective: Objective = Objective()
  optimizer: Optimizer = Optimizer()
  train: Train = Train()
  mesh: Mesh = Mesh()
  eval: Eval = Eval()
  run: Run = Run()


# fmt: on
FREE_KEYS = frozenset(
  name for name, field, _ in keys.walk(Config()) if field.metadata["free"]
)
