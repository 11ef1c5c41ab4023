"""The command line and the config file it names, as one checked config.

    config, name, workdir, mode = parse(sys.argv)

Keys and types are those of config/schema.py. Every refusal is a ValueError with
value and remedy; nothing here waits for JAX.
"""

import difflib
import importlib.util
import os
import pathlib
import sys
import traceback

import ml_collections

from rspo_jax.config import identity

MODES = ("train", "eval")

# Where `pip install` puts the configs (pyproject.toml, data-files).
INSTALLED = pathlib.Path(sys.prefix) / "share" / "rspo_jax"

# A group whose keys depend on the task: any name, checked when it is known.
_OPEN_GROUP = "task.reward_weights."


def parse(argv: list[str]):
  """(config, name of the config file, workdir or "", mode) of a command line.

  Raises:
    ValueError: one message with value and remedy.
  """
  options = {"config": "", "workdir": "", "mode": "train"}
  overrides, unknown = {}, []
  words = iter(argv[1:])
  for word in words:
    if not word.startswith("-"):
      raise ValueError(f"{word!r} is not an option; options start with --.")
    name, equals, value = word.lstrip("-").partition("=")
    if not equals:
      value = next(words, "--")
      if value.startswith("--"):
        raise ValueError(f"--{name} needs a value; write --{name}=VALUE.")
    if name in options:
      options[name] = value
    elif name.startswith("config."):
      overrides[name.removeprefix("config.")] = value
    else:
      unknown.append(name)
  if not options["config"]:
    raise ValueError(
      "--config is missing; try --config=configs/countdown.py (or --help)."
    )
  config = load_config(options["config"])
  for name in unknown:
    known = [*options, "help"]
    known += [f"config.{key}" for key in identity.flat(config.to_dict())]
    raise ValueError(f"--{name} is not an option{_nearest(name, known)}")
  for key, text in overrides.items():
    override(config, key, text)
  if options["mode"] not in MODES:
    raise ValueError(
      f"--mode={options['mode']} is not known; use --mode=train or --mode=eval."
    )
  name = pathlib.Path(options["config"].partition(":")[0]).stem
  return config.lock(), name, options["workdir"], options["mode"]


def load_config(text: str) -> ml_collections.ConfigDict:
  """The config of FILE[:ARG,...].

  Raises:
    ValueError: no such file, a file that fails, or one with other keys than
      configs/base.py.
  """
  path, colon, arg = text.partition(":")
  if not os.path.isfile(path) and (INSTALLED / path).is_file():
    path = str(INSTALLED / path)
  _make_configs_importable(path)
  if not os.path.isfile(path):
    folder = pathlib.Path(path).parent
    known = [str(file) for file in folder.glob("*.py")]
    raise ValueError(f"--config={path} is not a file{_nearest(path, known)}")
  spec = importlib.util.spec_from_file_location("rspo_jax_config_file", path)
  if spec is None:
    raise ValueError(f"--config={path} must be a Python file (*.py).")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config(arg) if colon else module.get_config()
  except Exception as error:  # a config file is a program of the caller's
    raise ValueError(f"--config={text}: {_cause(error, path)}") from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise ValueError(
      f"--config={path}: get_config must return what configs.base.get_config "
      "returns, with changed values."
    )
  keys = identity.flat(config.to_dict())
  for key, value in identity.defaults().items():
    if key not in keys or type(keys[key]) is not type(value):
      raise ValueError(
        f"--config={path} must set {key} to a {type(value).__name__}; start "
        "from configs.base.get_config() and change values only."
      )
    del keys[key]
  for key in keys:
    if not key.startswith(_OPEN_GROUP):
      raise ValueError(
        f"--config={path} sets {key}, which is not a key of rspo_jax/config/schema.py."
      )
  return config


def _make_configs_importable(path: str) -> None:
  """Lets a config file find `configs.base` where no clone is on the path.

  An installed command does not have the current folder on its path, as
  `python -m` has. Looked for beside the file, in the current folder, and where
  an installation keeps the configs.
  """
  if importlib.util.find_spec("configs") is not None:
    return
  beside = pathlib.Path(path).absolute().parent.parent
  for folder in (beside, pathlib.Path.cwd(), INSTALLED):
    if (folder / "configs" / "base.py").is_file():
      sys.path.append(str(folder))
      importlib.invalidate_caches()
      return


def override(config, key: str, text: str) -> None:
  """Sets one key from its text, in the type that it has.

  Raises:
    ValueError: the key does not exist, or the text is not of its type.
  """
  values = identity.flat(config.to_dict())
  if key.startswith(_OPEN_GROUP) and key not in values:
    values[key] = 0.0
  if key not in values:
    inside = [k for k in values if k.startswith(f"{key}.")]
    if inside:
      raise ValueError(
        f"--config.{key} is a group; set one of its keys: {', '.join(inside)}."
      )
    known = [f"config.{k}" for k in values]
    raise ValueError(
      f"--config.{key} is not a key of the config"
      f"{_nearest(f'config.{key}', known)}"
    )
  kind = type(values[key])
  try:
    if kind is bool:
      value = {"true": True, "1": True, "false": False, "0": False}[
        text.lower()
      ]
    else:
      value = kind(text)
  except (ValueError, KeyError):
    wanted = {bool: "true or false", int: "a whole number", float: "a number"}
    raise ValueError(
      f"--config.{key}={text} must be {wanted[kind]}, as its present value "
      f"{values[key]!r} is."
    ) from None
  *groups, name = key.split(".")
  for group in groups:
    config = config[group]
  config[name] = value


def _nearest(name: str, known) -> str:
  """The end of a message about a wrong name."""
  near = difflib.get_close_matches(name, known, 1, 0.6)
  if not near:
    # A key without its group, or in the wrong one.
    last = name.rpartition(".")[2]
    near = [k for k in known if k.rpartition(".")[2] == last][:1]
  if not near:
    return "; see --help."
  dashes = "" if os.sep in near[0] else "--"
  return f"; did you mean {dashes}{near[0]}?"


def _cause(error: Exception, path: str) -> str:
  """One line for what a config file raised, with its last line in the file."""
  text = " ".join(str(error).split())
  if type(error) is ValueError:
    return text
  lines = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if frame.filename.endswith(path)
  ]
  where = f" (line {lines[-1]})" if lines else ""
  return f"{type(error).__name__}: {text}{where}"
