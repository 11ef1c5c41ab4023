"""How completions are sampled: the options, and which of them fit together.

Without JAX, so that a command with a mistake is refused in a moment.
"""

import dataclasses
import numbers

CACHES = ("none", "prefix", "dual")
MASK_POLICIES = ("forbid", "compete")
# Keys of the dicts of these names in sampler.py, which implement them.
REMASKING = ("low_confidence", "random")
ALGORITHMS = ("llada", "maskgit_plus", "topk_margin", "entropy", "origin")


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
  """How a completion is sampled; static under jit.

  Attributes:
    completion_length: L, positions of the canvas that belong to the
      completion (its last ones).
    block_length: positions of a block, divides L.
    steps: T, forwards of all blocks together, a multiple of their number.
    temperature: of the token draws; 0 is greedy.
    remasking: key of `REMASKING`, the confidence that orders positions.
    algorithm: key of `ALGORITHMS`.
    cfg_scale: w of classifier-free guidance, 0 is off.
    top_p, top_k: filters of Dream's algorithms, None is off.
    cache: "none", "prefix" or "dual".
    threshold: commit every position at least this confident, and always the
      best one (above 1 nothing else); `steps` then bounds nothing.
    factor: commit rank r while its confidence is >= 1 - factor / (r + 2).
    stop_at_eos: a row ends at its first EOS with nothing masked before it;
      the positions after it are filled with EOS and cost nothing more once
      every row has ended or is full.
    mask_policy: "forbid": the mask token is never placed and only masks of
      the current block are filled, so a completion is full at the end.
      "compete", as the reference programs do: masks anywhere before the
      block's end compete for the step's quota, and a position whose best
      token is the mask stays masked.
    time_epsilon: smallest time of Dream's schedule.
    order_temperature: Dream's positions are drawn from
      softmax(confidence / order_temperature); 0 takes the best.
    logits_eos_inf: EOS is never proposed.
    confidence_eos_eot_inf: proposals of EOS and EoT get confidence 0 (above
      temperature 0 only EoT, as in LLaDA's program).
  """

  completion_length: int
  block_length: int
  steps: int
  temperature: float = 0.0
  remasking: str = "low_confidence"
  algorithm: str = "llada"
  cfg_scale: float = 0.0
  top_p: float | None = None
  top_k: int | None = None
  cache: str = "none"
  threshold: float | None = None
  factor: float | None = None
  stop_at_eos: bool = False
  mask_policy: str = "forbid"
  time_epsilon: float = 1e-3
  order_temperature: float = 0.0
  logits_eos_inf: bool = False
  confidence_eos_eot_inf: bool = False

  @property
  def blocks(self) -> int:
    """Number of blocks."""
    return self.completion_length // self.block_length

  @property
  def block_steps(self) -> int:
    """Steps of one block."""
    return self.steps // self.blocks

  @property
  def adaptive(self) -> bool:
    """Whether confidence decides how many positions a step commits."""
    return self.threshold is not None or self.factor is not None


def _require(condition: bool, message: str) -> None:
  """Raises ValueError with the message unless the condition holds."""
  if not condition:
    raise ValueError(message)


def _one_of(name: str, value, choices) -> None:
  """Raises unless value is one of the choices, which it names."""
  known = ", ".join(choices)
  _require(
    value in choices, f"sampler.{name}={value!r} must be one of {known}."
  )


def validate(settings: SamplerSettings) -> None:
  """Checks settings against each other.

  Raises:
    ValueError: naming the value and what to use instead.
  """
  s = settings
  for name in ("completion_length", "block_length", "steps"):
    value = getattr(s, name)
    _require(
      isinstance(value, numbers.Integral) and value >= 1,
      f"sampler.{name}={value!r} must be a whole number of at least 1.",
    )
  if s.completion_length % s.block_length:
    near = [
      d
      for d in range(1, s.completion_length + 1)
      if s.completion_length % d == 0
    ]
    near = sorted(near, key=lambda d: abs(d - s.block_length))[:2]
    raise ValueError(
      f"sampler.block_length={s.block_length} must divide "
      f"completion_length={s.completion_length}; use "
      f"{' or '.join(map(str, sorted(near)))}."
    )
  if s.steps % s.blocks:
    below = s.steps // s.blocks * s.blocks
    options = [below, below + s.blocks] if below else [s.blocks]
    raise ValueError(
      f"sampler.steps={s.steps} must be a multiple of "
      f"completion_length/block_length={s.blocks}; use "
      f"{' or '.join(map(str, options))}."
    )
  _one_of("algorithm", s.algorithm, ALGORITHMS)
  _one_of("remasking", s.remasking, REMASKING)
  _one_of("cache", s.cache, CACHES)
  _one_of("mask_policy", s.mask_policy, MASK_POLICIES)
  for name in ("temperature", "cfg_scale", "order_temperature"):
    value = getattr(s, name)
    _require(
      isinstance(value, numbers.Real) and 0 <= value < float("inf"),
      f"sampler.{name}={value!r} must be 0 or more and finite.",
    )
  _require(
    0 < s.time_epsilon < 1,
    f"sampler.time_epsilon={s.time_epsilon} must lie between 0 and 1; "
    "Dream uses 0.001.",
  )
  _validate_algorithm(s)
  _validate_adaptive(s)
  _require(
    s.cache == "none" or s.cfg_scale == 0,
    f"sampler.cache={s.cache!r} does not work with cfg_scale={s.cfg_scale}; "
    "use cache='none' or cfg_scale=0.",
  )


def _validate_algorithm(s: SamplerSettings) -> None:
  """Options that only LLaDA's, or only Dream's, algorithms have."""
  if s.algorithm == "llada":
    for name in ("top_p", "top_k"):
      value = getattr(s, name)
      _require(
        value is None,
        f"sampler.{name}={value} needs one of Dream's algorithms; switch it "
        "off, or use algorithm='maskgit_plus'.",
      )
    _require(
      s.order_temperature == 0,
      f"sampler.order_temperature={s.order_temperature} needs one of Dream's "
      "algorithms; use 0.",
    )
  else:
    wrong = {
      "remasking": s.remasking != "low_confidence",
      "logits_eos_inf": s.logits_eos_inf,
      "confidence_eos_eot_inf": s.confidence_eos_eot_inf,
    }
    for name, given in wrong.items():
      _require(
        not given,
        f"sampler.{name}={getattr(s, name)!r} needs algorithm='llada', not "
        f"{s.algorithm!r}.",
      )
    if s.top_p is not None:
      _require(
        isinstance(s.top_p, numbers.Real) and 0 < s.top_p <= 1,
        f"sampler.top_p={s.top_p!r} must lie in (0, 1]; 1 keeps all.",
      )
    if s.top_k is not None:
      _require(
        isinstance(s.top_k, numbers.Integral) and s.top_k >= 1,
        f"sampler.top_k={s.top_k!r} must be a whole number of at least 1; "
        "None keeps all.",
      )


def _validate_adaptive(s: SamplerSettings) -> None:
  """Threshold and factor."""
  for name in ("threshold", "factor"):
    value = getattr(s, name)
    if value is None:
      continue
    _require(
      s.algorithm == "llada",
      f"sampler.{name}={value} needs algorithm='llada'; "
      f"{s.algorithm!r} has its own schedule: switch {name} off.",
    )
    _require(
      isinstance(value, numbers.Real) and 0 < value < float("inf"),
      f"sampler.{name}={value!r} must be positive and finite; None is off.",
    )
    _require(
      s.remasking == "low_confidence",
      f"sampler.{name}={value} compares probabilities; use "
      f"remasking='low_confidence', not {s.remasking!r}.",
    )
  _require(
    s.threshold is None or s.factor is None,
    f"sampler.threshold={s.threshold} and factor={s.factor} exclude each "
    "other; switch one of them off.",
  )


def check_call(
  settings: SamplerSettings,
  canvas_shape: tuple[int, ...],
  eos_id: int | None = None,
  eot_id: int | None = None,
  first_block: int = 0,
  first_step: int = 0,
) -> None:
  """Checks valid settings against what `denoise` is called with.

  Raises:
    ValueError: naming the value and what to use instead.
  """
  s = settings
  _require(
    len(canvas_shape) == 2 and canvas_shape[1] >= s.completion_length,
    f"a canvas of shape {tuple(canvas_shape)} cannot hold "
    f"sampler.completion_length={s.completion_length}; pass [n, prompt + "
    f"{s.completion_length}].",
  )
  # Inside a compiled function they may be traced: the caller's business.
  known = all(
    isinstance(x, numbers.Integral) for x in (first_block, first_step)
  )
  _require(
    not known
    or (0 <= first_block < s.blocks and 0 <= first_step < s.block_steps),
    f"first_block={first_block}, first_step={first_step} must lie inside the "
    f"schedule of {s.blocks} blocks with {s.block_steps} steps each.",
  )
  needs_eos = s.stop_at_eos or s.logits_eos_inf or s.confidence_eos_eot_inf
  _require(
    eos_id is not None or not needs_eos,
    "stop_at_eos, logits_eos_inf and confidence_eos_eot_inf need eos_id; the "
    "checkpoint's config.json names it.",
  )
  _require(
    eot_id is not None or not s.confidence_eos_eot_inf,
    "confidence_eos_eot_inf needs eot_id, the end-of-turn token's id.",
  )
