"""Adapter folders in PEFT's layout: read, checked and written.

A folder holds adapter_config.json and adapter_model.safetensors, whose names
are those of the base checkpoint's modules:

    base_model.model.<module>.lora_A.weight  [r, in]
    base_model.model.<module>.lora_B.weight  [out, r]

PEFT matches `target_modules` against module names and passes over those that
match nothing. Adapters of LLaDA made with the seven names of a LLaMA therefore
hold q, k, v and up only, because LLaDA calls its other projections attn_out,
ff_proj and ff_out (the released ESPO adapters are such). So the tensors say
what is adapted, and the names are checked against them.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from rspo_jax.models import hf_folder, hf_weights, lora
from rspo_jax.models.families import (
  CheckpointError,
  ModelConfig,
  UnsupportedConfig,
)
from rspo_jax.models.hf_weights import (
  MissingTensor,
  UnexpectedTensor,
  WrongShape,
)
from rspo_jax.models.lora import LoraSettings

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Keys of adapter_config.json that are read here, or say nothing about what is
# computed with a trained adapter: names, versions, training's own settings.
_READ = (
  "auto_mapping",
  "base_model_name_or_path", "corda_config", "ensure_weight_tying",
  "eva_config", "exclude_modules", "inference_mode", "layers_pattern",
  "loftq_config", "lora_alpha", "lora_dropout", "megatron_core", "peft_type",
  "peft_version", "qalora_group_size", "r", "revision", "runtime_config",
  "target_modules", "task_type", "use_rslora",
)  # fmt: skip

# Values under which other keys switch nothing on. An option that PEFT gets
# tomorrow is refused by its name until it is known here.
_OFF = (None, False, "", [], {})
_NEUTRAL = {
  "bias": (None, "none"),
  "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
}


def load_adapter(
  path, config: ModelConfig, dtype="float32"
) -> tuple[LoraSettings, dict[str, Any], dict[str, Any]]:
  """Reads an adapter folder for a model.

  Args:
    path: folder, local or `gs://`, or a hub id.
    config: the base model's.
    dtype: of the adapter's arrays.

  Returns:
    (settings, adapter as `lora.init` makes it, adapter_config.json as read).

  Raises:
    MissingTensor, UnexpectedTensor, WrongShape, UnsupportedConfig,
    CheckpointError: naming tensor or key, and file.
  """
  folder = hf_weights.resolve_folder(path)
  file = folder / CONFIG
  if not file.exists():
    raise CheckpointError(
      f"{folder} has no {CONFIG}, so it is no PEFT adapter; a full checkpoint "
      "is loaded by load_model."
    )
  source = hf_weights.parse_json(hf_folder.read_small(file), str(file))
  if not (folder / WEIGHTS).exists():
    raise CheckpointError(
      f"{folder} has no {WEIGHTS}; adapters in .bin files have to be saved "
      "again as safetensors."
    )
  where = str(folder / WEIGHTS)
  modules = _modules(config)
  tensors = _by_module(
    hf_weights.read_tensors(folder / WEIGHTS, np.dtype(dtype)), where
  )
  targets = _check_modules(tensors, modules, source, where)
  settings = _settings(source, targets)
  adapter = {}
  for target in targets:
    names, shape = modules[target]
    *_, inputs, outputs = shape
    pairs = []
    for name in names:
      a, b = tensors[name]
      for matrix, letter, wanted in (
        (a, "A", (settings.rank, inputs)),
        (b, "B", (outputs, settings.rank)),
      ):
        if matrix.shape != wanted:
          raise WrongShape(
            f"{where}: {PREFIX}{name}.lora_{letter}.weight has shape "
            f"{matrix.shape}, r={settings.rank} and the base call for "
            f"{wanted}; is it an adapter of another model?"
          )
      pairs.append((a.T, b.T))
    a, b = (np.stack(side) for side in zip(*pairs, strict=True))
    if target == "head":
      adapter["head"] = {"a": jnp.asarray(a[0]), "b": jnp.asarray(b[0])}
    else:
      pair = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
      adapter.setdefault("layers", {})[target] = pair
  return settings, adapter, source


def save_adapter(
  path,
  config: ModelConfig,
  settings: LoraSettings,
  adapter,
  *,
  base: str = "",
  source: Mapping[str, Any] | None = None,
) -> None:
  """Writes an adapter folder that PEFT and `load_adapter` read.

  Args:
    path: folder, made if it is not there.
    config: the base model's.
    settings: of the adapter.
    adapter: as `lora.init` makes it; its dtype decides the storage.
    base: name or folder of the base checkpoint, for PEFT.
    source: adapter_config.json as read, kept field by field.
  """
  from etils import epath

  modules = _modules(config)
  tensors = {}
  for target in settings.targets:
    names, _ = modules[target]
    pair = adapter["head"] if target == "head" else adapter["layers"][target]
    a, b = (hf_weights.to_host(pair[side]) for side in ("a", "b"))
    if target == "head":
      a, b = a[None], b[None]
    for layer, name in enumerate(names):
      for letter, matrix in (("A", a[layer]), ("B", b[layer])):
        tensors[f"{PREFIX}{name}.lora_{letter}.weight"] = np.ascontiguousarray(
          matrix.T
        )
  written = dict(source) if source else _new_config(config, settings, base)
  written |= {
    "r": settings.rank,
    "lora_alpha": settings.alpha,
    "use_rslora": settings.rslora,
  }
  if base:
    written["base_model_name_or_path"] = base
  folder = epath.Path(path).expanduser()
  hf_weights.make_folder(folder)
  content = safetensors.numpy.save(tensors, metadata={"format": "pt"})
  hf_weights.write_file(folder / WEIGHTS, content)
  hf_weights.write_file(folder / CONFIG, hf_weights.json_bytes(written))


def _modules(
  config: ModelConfig,
) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
  """Checkpoint modules, one a layer, and kernel shape of each target."""
  found = {}
  for leaf in hf_weights.leaves(config):
    if leaf.path[-1] == "kernel":
      names = tuple(name.removesuffix(".weight") for name in leaf.names)
      found[leaf.path[-2]] = (names, leaf.shape)
  return found


def _by_module(tensors, where: str):
  """(A, B) by module name, from tensors by their stored names."""
  sides = {}
  for name, tensor in tensors.items():
    match = re.fullmatch(
      rf"{re.escape(PREFIX)}(.+)\.lora_([AB])(?:\.default)?\.weight", name
    )
    if match is None:
      raise UnexpectedTensor(
        f"{where}: {name} is no lora_A or lora_B of a module; only plain LoRA "
        "adapters can be loaded."
      )
    sides.setdefault(match[1], {})[match[2]] = tensor
  for module, pair in sides.items():
    if len(pair) < 2:
      have, lack = ("A", "B") if "A" in pair else ("B", "A")
      raise MissingTensor(
        f"{where}: {PREFIX}{module} has lora_{have} but no lora_{lack}; "
        "download the adapter again."
      )
  return {module: (pair["A"], pair["B"]) for module, pair in sides.items()}


def _check_modules(tensors, modules, source, where) -> tuple[str, ...]:
  """Targets that the tensors adapt, checked against names on both sides."""
  target_by_module = {
    name: target for target, (names, _) in modules.items() for name in names
  }
  for module in tensors:
    if module not in target_by_module:
      raise UnexpectedTensor(
        f"{where} adapts {module}, which the base model does not have; it is "
        "an adapter of another model."
      )
  adapted = {target_by_module[module] for module in tensors}
  patterns = source.get("target_modules")
  every = list(target_by_module)
  named = _matching(source, "target_modules", every)
  named -= _matching(source, "exclude_modules", every)
  for module, target in target_by_module.items():
    if module not in tensors and (target in adapted or module in named):
      raise MissingTensor(
        f"{where} has no {PREFIX}{module}.lora_A.weight, though "
        + (
          f"target_modules={patterns!r:.200} names it"
          if module in named
          else "other layers have one"
        )
        + "; download the adapter again."
      )
  if not adapted:
    raise MissingTensor(
      f"{where} holds no tensor, so the adapter would change nothing."
    )
  return tuple(target for target in lora.TARGETS if target in adapted)


def _matching(source, key: str, modules: list[str]) -> set[str]:
  """The modules that PEFT's target_modules or exclude_modules name."""
  patterns = source.get(key)
  if patterns is None or (key, patterns) == ("target_modules", "all-linear"):
    return set()
  if isinstance(patterns, str):
    try:
      return set(hf_folder.matching(patterns, modules))
    except ValueError as error:
      raise UnsupportedConfig(
        f"{CONFIG}: {key}={patterns!r:.120} is no expression that can be "
        f"matched ({error}); correct it, or give a list of names."
      ) from error
  if not isinstance(patterns, list) or not all(
    isinstance(pattern, str) for pattern in patterns
  ):
    raise UnsupportedConfig(
      f"{CONFIG}: {key}={patterns!r:.120} must be a list of names or one "
      "expression."
    )
  return {module for module in modules if _named(patterns, module)}


def _named(patterns, module: str) -> bool:
  """Whether a list of names has a module or the end of its name."""
  return any(module == p or module.endswith(f".{p}") for p in patterns)


def _settings(source, targets) -> LoraSettings:
  """LoraSettings of an adapter_config.json, or what it asks for in vain."""
  if source.get("peft_type") != "LORA":
    raise UnsupportedConfig(
      f"{CONFIG}: peft_type={source.get('peft_type')!r:.80} is not supported; "
      "only 'LORA' can be loaded."
    )
  for key, value in source.items():
    neutral = _NEUTRAL.get(key, _OFF)
    if key not in _READ and value not in neutral:
      raise UnsupportedConfig(
        f"{CONFIG}: {key:.80}={value!r:.120} is not supported; only "
        f"{' or '.join(map(repr, neutral))} can be computed here. Merge the "
        "adapter with PEFT and load the full weights."
      )
  for key in ("r", "lora_alpha"):
    if key not in source:
      raise UnsupportedConfig(
        f"{CONFIG} has no {key}, which scales the adapter; add it."
      )
  rslora = source.get("use_rslora")
  if rslora not in (None, False, True):
    raise UnsupportedConfig(
      f"{CONFIG}: use_rslora={rslora!r:.80} must be true or false."
    )
  try:
    settings = LoraSettings(
      rank=source["r"],
      alpha=source["lora_alpha"],
      targets=targets,
      rslora=bool(rslora),
    )
    float(settings.scale)  # whole numbers beyond all floats
    return settings
  except (TypeError, ValueError, OverflowError) as error:
    raise UnsupportedConfig(f"{CONFIG}: {error}") from error


def _new_config(config, settings, base) -> dict[str, Any]:
  """adapter_config.json of an adapter that was made here."""
  modules = _modules(config)
  wanted = {name for t in settings.targets for name in modules[t][0]}
  names = sorted({name.rsplit(".", 1)[-1] for name in wanted})
  every = {name for names_, _ in modules.values() for name in names_}
  target_modules: Any = names
  if {name for name in every if _named(names, name)} != wanted:
    # LLaDA calls a layer's down projection and its head both ff_out; a list
    # of names would adapt both, an expression names exactly ours.
    stems = sorted({re.sub(r"\.\d+\.", r".#.", name) for name in wanted})
    parts = [re.escape(s).replace(r"\#", r"\d+") for s in stems]
    target_modules = "|".join(parts)
  return {
    "base_model_name_or_path": base,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_to_transform": None,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "peft_type": "LORA",
    "target_modules": target_modules,
    "task_type": None,
  }
