"""The functions that users call; `import rspo_jax` exposes them lazily.

Each checks what it is given on the host, before anything is compiled, and
then calls one compiled program per (shape, setting).
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import numpy as np

from rspo_jax import sampler
from rspo_jax.models import transformer
from rspo_jax.models.hf_weights import Model, load_model, save_model

__all__ = ["generate", "load_model", "logits", "save_model", "verify"]


def logits(model: Model, tokens, attention_mask=None) -> jax.Array:
  """The logits that predict the token at each position.

  Args:
    model: what `load_model` returns.
    tokens: i32 [n, S].
    attention_mask: [n, S], 0 or False where a token is padding; None: no
      padding. Rows of the result at padding mean nothing.

  Returns:
    f32 [n, S, V]; row j predicts token j (Dream's shift is done).

  Raises:
    ValueError: shapes that do not fit, or ids outside the vocabulary.
  """
  tokens = _checked_tokens("tokens", tokens, model.config.vocab_size)
  mask = _checked_mask(attention_mask, tokens.shape)
  return _logits(model.config, model.params, tokens, mask)


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens, mask):
  """Compiled part of `logits`."""
  with precision(config):
    denoise_fn = transformer.make_denoise_fn(config)
    rows, _ = denoise_fn(params, tokens, mask, None, 0, tokens.shape[1])
  return rows


@dataclasses.dataclass(frozen=True)
class Generated:
  """What `generate` returns.

  Attributes:
    tokens: i32 [n, P + gen_length], prompts and completions.
    denoiser_calls: forwards of the model; a guided pair counts once.
    commit_step: i32 [n, gen_length], the forward that wrote each position;
      -1 where it was given or stayed masked.
  """

  tokens: np.ndarray
  denoiser_calls: int
  commit_step: np.ndarray


def generate(
  model: Model,
  prompts,
  attention_mask=None,
  *,
  gen_length: int,
  steps: int,
  block_length: int,
  temperature: float = 0.0,
  cfg_scale: float = 0.0,
  remasking: str = "low_confidence",
  algorithm: str = "llada",
  top_p: float | None = None,
  top_k: int | None = None,
  cache: str = "none",
  threshold: float | None = None,
  factor: float | None = None,
  seed: int = 0,
  mask_id: int | None = None,
  eos_id: int | None = None,
  noise=None,
  canvas=None,
  eot_id: int | None = None,
  eps: float = 1e-3,
  alg_temp: float = 0.0,
  logits_eos_inf: bool = False,
  confidence_eos_eot_inf: bool = False,
  stop_at_eos: bool = False,
  mask_policy: str = "compete",
) -> Generated:
  """Completes prompts by block-wise denoising, as the original programs do.

  One program is compiled per (shape, setting); seed, prompts and padding may
  change without another compilation.

  Args:
    model: what `load_model` returns.
    prompts: i32 [n, P], shorter ones padded on the left.
    attention_mask: [n, P], 0 at padding, which each row has on its left only;
      None: no padding.
    gen_length: tokens of each completion.
    steps: denoising steps of all blocks together, a multiple of their number
      gen_length / block_length.
    block_length: tokens of a block, filled from left to right; gen_length
      with Dream's algorithms, which know no blocks.
    temperature: of the tokens; 0 is greedy.
    cfg_scale: classifier-free guidance, 0 is off.
    remasking: "low_confidence" or "random" (algorithm "llada").
    algorithm: "llada", or Dream's "maskgit_plus", "topk_margin", "entropy",
      "origin".
    top_p, top_k: filters of Dream's algorithms.
    cache: "none", or Fast-dLLM's "prefix" or "dual".
    threshold, factor: commit by confidence instead of by schedule.
    seed: of all draws; the same seed gives the same tokens.
    mask_id, eos_id: None takes the checkpoint's.
    noise: recorded uniforms in place of draws: f32 [T, n, S, V] for tokens,
      [T, n, S] for positions, [T, m] for the positions still masked, or a
      mapping with the keys "tokens", "positions", "masked" for several.
    canvas: i32 [n, gen_length], a partly filled completion with the mask id
      where it is empty; None: all empty. [n, P + gen_length] is taken too.
    eot_id: end-of-turn token; None takes "<|eot_id|>" of the tokenizer.
    eps, alg_temp: smallest time of Dream's schedule; temperature of the order
      in which its positions are taken.
    logits_eos_inf, confidence_eos_eot_inf: LLaDA's options against early ends.
    stop_at_eos: end a row at its first EOS and stop when all have ended.
    mask_policy: "compete" is the original's rule, in which masks of the
      prompt are filled too and a predicted mask token stays; "forbid" never
      writes it.

  Raises:
    ValueError: before anything is compiled, naming value and remedy.
  """
  config = model.config
  settings = sampler.SamplerSettings(
    completion_length=gen_length,
    block_length=block_length,
    steps=steps,
    temperature=temperature,
    remasking=remasking,
    algorithm=algorithm,
    cfg_scale=cfg_scale,
    top_p=top_p,
    top_k=top_k,
    cache=cache,
    threshold=threshold,
    factor=factor,
    stop_at_eos=stop_at_eos,
    mask_policy=mask_policy,
    time_epsilon=eps,
    order_temperature=alg_temp,
    logits_eos_inf=logits_eos_inf,
    confidence_eos_eot_inf=confidence_eos_eot_inf,
  )
  sampler.validate(settings)
  if algorithm != "llada" and block_length != gen_length:
    raise ValueError(
      f"algorithm={algorithm!r} knows no blocks; use block_length="
      f"gen_length={gen_length} instead of {block_length}."
    )
  ids = _generate_ids(model, mask_id, eos_id, eot_id)
  prompts = _checked_tokens("prompts", prompts, config.vocab_size)
  mask = _checked_prompt_mask(attention_mask, prompts.shape)
  canvas = _whole_canvas(prompts, canvas, gen_length, ids[0], config.vocab_size)
  n, length = canvas.shape
  token_mask = np.ones((n, length), bool)
  if mask is not None:
    token_mask[:, : prompts.shape[1]] = mask
  sampler.check_call(settings, canvas.shape, ids[1], ids[2])
  # An adaptive sampler ends when it is done: nobody knows its forwards before.
  forwards = 1 if settings.adaptive else settings.steps
  noise = _checked_noise(noise, canvas.shape, config.vocab_size, forwards)
  if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
    raise ValueError(f"seed={seed!r} must be a whole number below 2**32.")
  out = _generate(
    config, settings, ids, model.params, canvas, token_mask, np.uint32(seed),
    noise,
  )  # fmt: skip
  return Generated(
    tokens=np.asarray(out.tokens),
    denoiser_calls=int(out.denoiser_calls),
    commit_step=np.asarray(out.commit_step),
  )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(config, settings, ids, params, canvas, token_mask, seed, noise):
  """Compiled part of `generate`."""
  mask_id, eos_id, eot_id = ids
  with precision(config):
    return sampler.denoise(
      transformer.make_denoise_fn(config),
      params,
      canvas,
      token_mask,
      jax.random.key(seed),
      settings,
      mask_id=mask_id,
      eos_id=eos_id,
      eot_id=eot_id,
      noise=noise,
    )


def _generate_ids(model: Model, mask_id, eos_id, eot_id):
  """Mask, EOS and EoT ids: what the caller says, else the checkpoint's."""
  config, tokenizer = model.config, model.tokenizer
  if mask_id is None:
    mask_id = config.mask_id
  if eos_id is None:
    eos_id = config.eos_id
  if eot_id is None and tokenizer is not None:
    eot_id = tokenizer.backend.token_to_id("<|eot_id|>")
  named = {"mask_id": mask_id, "eos_id": eos_id, "eot_id": eot_id}
  for name, value in named.items():
    if value is not None and not 0 <= value < config.vocab_size:
      raise ValueError(
        f"{name}={value} lies outside the model's vocabulary "
        f"0..{config.vocab_size - 1}."
      )
  return tuple(None if v is None else int(v) for v in named.values())


def _whole_canvas(prompts, canvas, gen_length, mask_id, vocab_size):
  """Prompts and completions side by side, i32 [n, P + gen_length]."""
  n, prompt_length = prompts.shape
  if canvas is None:
    completion = np.full((n, gen_length), mask_id, np.int32)
    return np.concatenate([prompts, completion], axis=1)
  canvas = _checked_tokens("canvas", canvas, vocab_size)
  if canvas.shape == (n, prompt_length + gen_length):
    if not (canvas[:, :prompt_length] == prompts).all():
      raise ValueError(
        "canvas begins with other tokens than prompts; give only its last "
        f"gen_length={gen_length} columns, or the same prompts."
      )
    return canvas
  if canvas.shape != (n, gen_length):
    raise ValueError(
      f"canvas has shape {canvas.shape}; give [{n}, gen_length={gen_length}]."
    )
  return np.concatenate([prompts, canvas], axis=1)


def _checked_noise(noise, shape, vocab_size, forwards) -> sampler.Noise | None:
  """Recorded uniforms under their names, with their shapes checked."""
  if noise is None or isinstance(noise, sampler.Noise):
    return noise
  if not isinstance(noise, Mapping):
    array = np.asarray(noise, np.float32)
    name = {4: "tokens", 3: "positions", 2: "masked"}.get(array.ndim)
    if name is None:
      raise ValueError(
        f"noise has shape {array.shape}; give [T, n, S, V], [T, n, S] or "
        "[T, m]."
      )
    noise = {name: array}
  wanted = {"tokens": (*shape, vocab_size), "positions": shape}
  for name, array in noise.items():
    if name not in ("tokens", "positions", "masked"):
      raise ValueError(
        f"noise has the key {name!r}; use tokens, positions or masked."
      )
    if name in wanted and np.shape(array)[1:] != wanted[name]:
      raise ValueError(
        f"noise for {name} has shape {np.shape(array)}; give [T, "
        f"{', '.join(map(str, wanted[name]))}], one entry a forward."
      )
    if len(array) < forwards:
      raise ValueError(
        f"noise for {name} has {len(array)} entries; the sampler does "
        f"{forwards} forwards and takes one for each."
      )
  return sampler.Noise(
    **{name: np.asarray(array, np.float32) for name, array in noise.items()}
  )


def verify(task: str, example, completion: str, protocol: str = "strict"):
  """Judges a completion.

  Args:
    task: key of `rspo_jax.tasks.TASKS`.
    example: fields of the task's example, as its data source gives them.
    completion: any text.
    protocol: "strict", or "d1" to repeat that code's verdicts.

  Returns:
    `.reward` float, `.correct` bool, `.parts` dict of float.

  Raises:
    ValueError: unknown task or protocol, or an example without the fields;
      never because of what the completion says.
  """
  from rspo_jax.tasks import TASKS

  if task not in TASKS:
    raise ValueError(f"task={task!r} must be one of {sorted(TASKS)}.")
  try:
    return TASKS[task].verify(example, completion, protocol=protocol)
  except KeyError as error:
    raise ValueError(
      f"the example {example!r} has no field {error}, which task={task!r} "
      "needs."
    ) from error


def precision(config):
  """True float32 products where the model computes in float32.

  Accelerators otherwise round float32 inputs of a product to 10 or 7 bits,
  which moves logits by more than the distance between close tokens.
  """
  precise = config.compute_dtype == "float32"
  return jax.default_matmul_precision("highest" if precise else "default")


def _checked_tokens(name: str, tokens, vocab_size: int) -> np.ndarray:
  """Token ids as i32 [n, S], or the error that says what is wrong."""
  try:
    array = np.asarray(tokens)
  except ValueError as error:
    raise ValueError(
      f"{name} has rows of different lengths; pad shorter ones on the left and "
      "pass attention_mask."
    ) from error
  if array.ndim != 2 or 0 in array.shape:
    raise ValueError(
      f"{name} has shape {array.shape}; give [n, S] with at least one token "
      "(pad shorter rows on the left and pass attention_mask)."
    )
  if not np.issubdtype(array.dtype, np.integer):
    raise ValueError(f"{name} has dtype {array.dtype}; give integer ids.")
  low, high = int(array.min()), int(array.max())
  if low < 0 or high >= vocab_size:
    raise ValueError(
      f"{name} holds the id {low if low < 0 else high}, outside the model's "
      f"vocabulary 0..{vocab_size - 1}; was it made by another tokenizer?"
    )
  return array.astype(np.int32)


def _checked_mask(mask, shape) -> np.ndarray | None:
  """Padding mask as bool [n, S]; None when nothing is padding."""
  if mask is None:
    return None
  array = np.asarray(mask)
  if array.shape != tuple(shape):
    raise ValueError(
      f"attention_mask has shape {array.shape}, the tokens have {shape}; "
      "give one entry a token."
    )
  if not np.isin(array, (0, 1)).all():
    raise ValueError("attention_mask must hold only 0 (padding) and 1.")
  array = array.astype(bool)
  empty = np.flatnonzero(~array.any(axis=1))
  if len(empty):
    raise ValueError(
      f"attention_mask marks every token of row {empty[0]} as padding; leave "
      "such a row out."
    )
  return array


def _checked_prompt_mask(mask, shape) -> np.ndarray | None:
  """The same for prompts, whose completions follow their last column."""
  array = _checked_mask(mask, shape)
  if array is None:
    return None
  behind = np.argwhere(array[:, :-1] & ~array[:, 1:])
  if len(behind):
    row, place = behind[0]
    raise ValueError(
      f"attention_mask marks row {row} as padded behind a token, at position "
      f"{place + 1}: its completion would not follow its prompt; pad prompts "
      "on the left (tokenizer.padding_side='left')."
    )
  return array
