"""Every key of a run with its default; task files state only differences.

Keys are read by `rspo_jax.settings`, which checks them across fields and names
value and remedy of what it refuses. `--config.GROUP.KEY=VALUE` overrides one.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the defaults of every key."""
  config = ml_collections.ConfigDict()

  config.model = model = ml_collections.ConfigDict()
  # Checkpoint folder in the Hugging Face layout, or "embedded:NAME" for one
  # that the package carries; "" trains a new model (supervised runs only).
  model.path = ""
  model.published = ""  # key of rspo_jax.models.published.PUBLISHED: the shape
  #                       that launch/plan.py takes while path is ""
  model.compute_dtype = "auto"  # auto (float32 on CPU, else bfloat16) | float32
  #                               | bfloat16: dtype of matmul inputs
  model.param_dtype = "float32"  # float32 | bfloat16: storage of parameters;
  #                                bfloat16 ones are rounded stochastically
  model.attention = "einsum"  # einsum | flash: scores are never held; splash
  #                             kernel on TPU (heads of a multiple of 128),
  #                             cuDNN on GPU (bfloat16), XLA's form elsewhere;
  #                             from about 1,024 tokens on
  model.remat = False  # recompute layer activations in the backward pass
  model.head_chunks = 1  # pieces in which the vocabulary head is evaluated
  model.new = new = ml_collections.ConfigDict()  # shape, where path is ""
  new.width = 96  # D
  new.layers = 4
  new.heads = 3
  new.kv_heads = 3
  new.mlp_width = 256
  new.rope_theta = 10000.0
  new.norm_eps = 1e-5
  new.max_length = 64  # longest sequence, tokens
  new.vocabulary = "0 1 2 3 4"  # pieces of text, separated by spaces; \s
  #                               is a space, \n a new line
  new.pattern = "."  # regular expression of a piece

  config.lora = lora = ml_collections.ConfigDict()
  lora.rank = 0  # columns of the adapter's A; 0: all parameters are trained
  lora.alpha = 64.0  # the adapter's scale is alpha / rank
  lora.targets = "query,key,value,out,gate,up,down"  # adapted projections, of
  #                                        rspo_jax.models.lora.TARGETS
  lora.rslora = False  # scale alpha / sqrt(rank)
  lora.path = ""  # adapter folder (PEFT's layout, or gs://) that the run starts
  #     from, its reference too; rank, alpha and targets are then the folder's
  lora.dual = True  # policy and reference in one pass over the frozen base;
  #                   False: the reference alone, while the host verifies
  lora.merge_dtype = "stored"  # stored (model.param_dtype) | float32: of model/

  config.task = task = ml_collections.ConfigDict()
  task.name = "countdown"  # key of rspo_jax.tasks.TASKS, reasoning_gym:NAME
  #                          (rspo_jax/tasks/gym.py), or module:function
  #                          (rspo_jax/tasks/own.py)
  task.prompt_style = "compact"  # template of the prompt
  task.protocol = "strict"  # strict | d1 (bug-compatible)
  task.reward_weights = ml_collections.ConfigDict()  # part -> weight; empty:
  #                                                    the task's own

  config.reward = reward = ml_collections.ConfigDict()
  reward.extra = ""  # module:function whose score is added to the reward, times
  #                    task.reward_weights.extra
  reward.workers = 2  # processes that call it, or a task that is a function
  reward.time_limit_s = 5.0  # of one call, then its completion gets no reward
  reward.memory_mb = 2048  # of one process

  config.data = data = ml_collections.ConfigDict()
  data.size = "small"  # small | large: builder config of a generated task
  data.seed = 0  # of the generated data
  data.dir = ""  # prepared datasets; "": RSPO_JAX_DATA or a folder in ~/.cache
  data.source = ""  # JSONL or CSV file read instead of a prepared or downloaded
  #                   dataset; {split} in its path stands for train, validation,
  #                   test; NAME:PATH is a published test file by name
  #                   (rspo_jax/datasets/published.py)
  data.prompt_length = 7  # P: static, shorter prompts are left-padded
  data.long_prompts = "refuse"  # refuse | keep_tail: a prompt of more tokens
  data.corrupt_share = 0.0  # demonstrations replaced by mixed-quality ones
  #                           (supervised runs)

  config.rollout = rollout = ml_collections.ConfigDict()
  rollout.prompts = 48  # B: prompts of one step, over all devices
  rollout.group_size = 8  # G: completions of one prompt
  rollout.temperature = 1.0  # of the training rollouts
  rollout.stale_steps = 0  # 0 | 1: with 1 the completions of a step are sampled
  #      before the update of the step before it, while the host verifies that
  #      one's; for objectives that stay right on them (docs/method.md)
  rollout.keep_groups = 0  # groups with unequal rewards that a step takes at
  #      most: with more prompts than that, batches are full of them; 0: all

  config.sampler = sampler = ml_collections.ConfigDict()
  sampler.completion_length = 8  # L: static
  sampler.block_length = 8  # positions filled before the next block starts
  sampler.steps = 8  # T: denoising steps of all blocks together; 0: L
  sampler.algorithm = "llada"  # key of rspo_jax.sampler.ALGORITHMS
  sampler.remasking = "low_confidence"  # key of rspo_jax.sampler.REMASKING
  sampler.cache = "none"  # none | prefix | dual: keys and values that a block's
  #                         later steps read instead of computing them
  sampler.threshold = 0.0  # commit all that are at least this probable; 0: off
  sampler.factor = 0.0  # commit rank r while p >= 1 - factor / (r + 2); 0: off
  sampler.stop_at_eos = False  # nothing more is sampled behind a first EOS
  sampler.cfg_scale = 0.0  # classifier-free guidance; 0: off
  sampler.top_p = 1.0  # nucleus of Dream's algorithms; 1: all
  sampler.top_k = 0  # best tokens kept by Dream's algorithms; 0: all
  sampler.order_temperature = 0.0  # of the order of Dream's positions; 0: best

  config.likelihood = likelihood = ml_collections.ConfigDict()
  likelihood.scheme = "complementary"  # key of rspo_jax.likelihood.ESTIMATORS
  likelihood.masks = 2  # K: masks (forward passes) of a completion; 0 with
  #                       scheme trace: as many as the sampler has steps
  # completion (through the first EOS, later positions hidden from attention) |
  # canvas (all L) | masked_tail (as completion, later positions seen as masks)
  likelihood.scope = "completion"
  likelihood.block_length = 0  # of block_random; 0: the sampler's
  likelihood.prompt_mask = 0.15  # probability that mean_field hides a prompt
  #                        token, block_random one of prompt and earlier blocks
  likelihood.shrink = 1  # sampling steps that share a canvas of trace

  config.objective = objective = ml_collections.ConfigDict()
  objective.name = "rspo"  # key of rspo_jax.objectives.OBJECTIVES
  objective.lambda_ = 0.01  # temperature of the KL-regularised problem, >= 0
  objective.lambda_unit = "sequence"  # token | sequence: nats per ...
  objective.lambda_share = 0.0  # share of the advantage's std that lambda
  #                    follows from lambda_ on (gap/lambda_share); 0: it stays
  objective.centring = "group"  # group | batch | none
  objective.subtract_reference = True  # False: the gap forgets the reference
  objective.gap_masks = "shared"  # shared | leave_one_out
  objective.normalize_advantages = True  # divide by the group's std (ddof 1)
  objective.skip_equal_groups = False  # drop groups whose rewards are equal
  objective.solved_advantage = 0.0  # of completions of a group that are all
  #                    right and equally rewarded, for rspo; 0: nothing is
  #                    learnt from it (paper)
  objective.reference_every = 0  # steps after which the policy becomes the
  #                                reference; 0: never
  # Of the other objectives (rspo_jax/baselines.py):
  objective.clip = 0.2  # half-width of the ratio's trust region, >= 0
  objective.kl_weight = 0.0  # pull to the reference (tracerl: old policy), >= 0
  objective.kl_reduction = "mean"  # mean | sum, of tracerl's pull in a step
  objective.ratio_norm = "none"  # none | length: gdpo's log-ratio
  objective.beta = 1.0  # inverse temperature of vrpo and trafl, > 0
  objective.pairs = "all"  # all | extremes: vrpo's pairs, better x worse
  objective.sft_weight = 0.0  # vrpo's weight of the winner's score, >= 0
  objective.negative_score = "mix"  # mix | eubo | elbo | none: spg, A < 0
  objective.bound_mix = 0.5  # spg's share of the upper bound, 0 to 1
  objective.bound_power = 1.5  # exponent of spg's upper bound, > 0
  objective.finishes = 1  # sapo's completions of each partial canvas

  config.optimizer = optimizer = ml_collections.ConfigDict()
  optimizer.learning_rate = 1e-4  # peak
  optimizer.schedule = "constant"  # constant | linear | cosine
  optimizer.warmup_steps = 0
  optimizer.final_share = 0.0  # last rate / peak, for linear and cosine
  optimizer.b1 = 0.9
  optimizer.b2 = 0.99
  optimizer.eps = 1e-8
  optimizer.weight_decay = 0.0  # of matrices
  optimizer.clip_norm = 1.0  # global gradient norm
  optimizer.moment_dtype = "float32"  # float32 | bfloat16: storage of moments
  #      and of a step's sum of gradients (that of float32 parameters: float32)

  config.train = train = ml_collections.ConfigDict()
  train.micro_batch = 32  # sequences of one forward-backward, over all devices
  train.micro_masks = 0  # masks of each of them in it, whole draws (pairs with
  #                       complementary), then in two passes; 0: all
  train.passes = "auto"  # auto | one | two
  train.updates_per_rollout = 1  # mu: updates on one rollout, masks redrawn

  config.mesh = mesh = ml_collections.ConfigDict()
  mesh.data = 1  # replicas; -1: what the other axes leave
  mesh.fsdp = -1  # shards of parameters and batch; -1: what the others leave
  mesh.tensor = 1  # shards of heads, mlp and vocabulary
  mesh.rollout_tensor = 0  # sampling alone: parameters are laid out once a step
  #                          over so many devices (heads, mlp, vocabulary) and
  #                          copied to the others; 0: gathered for every forward
  #                          from where training has them

  config.eval = evaluation = ml_collections.ConfigDict()
  evaluation.split = "validation"  # train | validation | test
  evaluation.prompts = 2048  # the first ones of the split; 0: all
  evaluation.completion_length = 0  # L of evaluation; 0: the sampler's
  evaluation.block_length = 0  # 0: the sampler's
  evaluation.steps = 0  # 0: the sampler's steps, scaled with the length
  evaluation.batch = 256  # prompts decoded together
  evaluation.temperature = 1.0  # of eval/accuracy_sampled
  evaluation.every = 0  # also every so many steps; 0: before and after only
  evaluation.samples = 1  # completions of a prompt at that temperature; with
  #                         several pass@k is reported too
  # Only in --mode=eval: one evaluation of each combination.
  evaluation.completion_lengths = ""  # such as "128,256,512"; "": the one above
  evaluation.samplers = ""  # such as "llada,llada+dual+threshold=0.9,entropy";
  #                           "": as in group sampler
  evaluation.seeds = ""  # such as "0,1,2"; "": run.seed
  evaluation.d1_files = False  # also write completions as d1's program does

  config.run = run = ml_collections.ConfigDict()
  run.steps = 100
  run.seed = 0
  run.checkpoint_every = 50  # steps; the last step is always saved
  run.keep_checkpoints = 2  # newest ones
  run.keep_best = 0  # also those of highest eval/accuracy; every evaluated step
  #                    is then saved
  run.keep_every = 0  # also those of steps that this divides; 0: none
  run.non_finite_limit = 3  # steps in a row that are not finite before the run
  #                           stops; 0: it never does
  run.collapse_window = 10  # steps over which a collapse is looked for; 0: none
  run.grace_s = 300.0  # from a signal to the end, saved or not; 0: no limit
  run.accept_changes = False  # go on though the config means something else now
  run.samples_every = 25  # steps between samples/ files; 0: evaluations only
  run.tensorboard = True
  run.logger = ""  # wandb | trackio | both with a comma; "": neither
  run.profile = 0  # steps of which a JAX profile is written, after the first
  run.export = True  # write model/ at the end
  run.compilation_cache = "auto"  # folder; auto: in ~/.cache; "": none
  run.log = "normal"  # quiet | normal | debug
  return config


# Switches that say what is trained: they set the stage for all others.
FIRST = ("llada_8b", "dream_7b", "full")


def apply(config, arg: str, switches) -> ml_collections.ConfigDict:
  """Applies `:a,b` arguments of a config file: models first, the rest in order.

  Args:
    config: the task's config.
    arg: the text behind the colon; may be empty.
    switches: function by name; each changes the config in place.

  Raises:
    ValueError: a switch that does not exist.
  """
  import difflib

  names = [part.strip() for part in arg.split(",") if part.strip()]
  for name in names:
    if name not in switches:
      near = difflib.get_close_matches(name, switches, 1)
      hint = f" did you mean {near[0]!r}?" if near else ""
      raise ValueError(
        f"config argument {name!r} is not known:{hint} choose from "
        f"{', '.join(switches)}."
      )
  # Two models: the later one, as ever.
  for name in sorted(names, key=lambda n: (n not in FIRST, n == "full")):
    switches[name](config)
  return config
