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

from rspo_jax.models import checkpoints, lora
from rspo_jax.models.checkpoints import (
  MissingTensor,
  UnexpectedTensor,
  WrongShape,
)
from rspo_jax.models.families import (
  CheckpointError,
  ModelConfig,
  UnsupportedConfig,
)
from rspo_jax.models.lora import LoraSettings

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Keys of adapter_config.json that change what is computed, with the values
# under which this module computes the same.
_NEUTRAL = {
  "alpha_pattern": (None, {}),
  "bias": (None, "none"),
  "fan_in_fan_out": (None, False),
  "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
  "layer_replication": (None,),
  "layers_to_transform": (None,),
  "lora_bias": (None, False),
  "modules_to_save": (None, []),
  "rank_pattern": (None, {}),
  "target_parameters": (None, []),
  "trainable_token_indices": (None,),
  "use_dora": (None, False),
  "use_qalora": (None, False),
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
  folder = checkpoints.resolve_folder(path)
  file = folder / CONFIG
  if not file.exists():
    raise CheckpointError(
      f"{folder} has no {CONFIG}, so it is no PEFT adapter; a full checkpoint "
      "is loaded by load_model."
    )
  source = checkpoints.parse_json(file.read_bytes(), str(file))
  if not (folder / WEIGHTS).exists():
    raise CheckpointError(
      f"{folder} has no {WEIGHTS}; adapters in .bin files have to be saved "
      "again as safetensors."
    )
  where = str(folder / WEIGHTS)
  modules = _modules(config)
  tensors = _by_module(
    checkpoints.read_tensors(folder / WEIGHTS, np.dtype(dtype)), where
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
    a, b = (checkpoints.to_host(pair[side]) for side in ("a", "b"))
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
  checkpoints.make_folder(folder)
  content = safetensors.numpy.save(tensors, metadata={"format": "pt"})
  checkpoints.write_file(folder / WEIGHTS, content)
  checkpoints.write_file(folder / CONFIG, checkpoints.json_bytes(written))


def _modules(
  config: ModelConfig,
) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
  """Checkpoint modules, one a layer, and kernel shape of each target."""
  found = {}
  for leaf in checkpoints.leaves(config):
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
  for module, target in target_by_module.items():
    named = _matches(patterns, module)
    if module not in tensors and (target in adapted or named):
      raise MissingTensor(
        f"{where} has no {PREFIX}{module}.lora_A.weight, though "
        + (
          f"target_modules={patterns!r} names it"
          if named
          else "other layers have one"
        )
        + "; download the adapter again."
      )
  if not adapted:
    raise MissingTensor(
      f"{where} holds no tensor, so the adapter would change nothing."
    )
  return tuple(target for target in lora.TARGETS if target in adapted)


def _matches(patterns, module: str) -> bool:
  """Whether PEFT's target_modules name a module."""
  if patterns is None or patterns == "all-linear":
    return False
  if isinstance(patterns, str):
    return re.fullmatch(patterns, module) is not None
  return any(module == p or module.endswith(f".{p}") for p in patterns)


def _settings(source, targets) -> LoraSettings:
  """LoraSettings of an adapter_config.json, or what it asks for in vain."""
  if source.get("peft_type") != "LORA":
    raise UnsupportedConfig(
      f"{CONFIG}: peft_type={source.get('peft_type')!r} is not supported; "
      "only 'LORA' can be loaded."
    )
  for key, neutral in _NEUTRAL.items():
    if key in source and source[key] not in neutral:
      raise UnsupportedConfig(
        f"{CONFIG}: {key}={source[key]!r} is not supported; only "
        f"{' or '.join(map(repr, neutral))} can be computed here. Merge the "
        "adapter with PEFT and load the full weights."
      )
  for key in ("r", "lora_alpha"):
    if key not in source:
      raise UnsupportedConfig(
        f"{CONFIG} has no {key}, which scales the adapter; add it."
      )
  try:
    return LoraSettings(
      rank=source["r"],
      alpha=source["lora_alpha"],
      targets=targets,
      rslora=bool(source.get("use_rslora", False)),
    )
  except (TypeError, ValueError) as error:
    raise UnsupportedConfig(f"{CONFIG}: {error}") from error


def _new_config(config, settings, base) -> dict[str, Any]:
  """adapter_config.json of an adapter that was made here."""
  modules = _modules(config)
  wanted = {name for t in settings.targets for name in modules[t][0]}
  names = sorted({name.rsplit(".", 1)[-1] for name in wanted})
  every = {name for names_, _ in modules.values() for name in names_}
  target_modules: Any = names
  if {name for name in every if _matches(names, name)} != wanted:
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
