"""The command line and the config file it names, as one checked config.

    config, name, workdir, mode = parse(sys.argv)

Keys and types are those of config/schema.py. Every refusal is a ValueError with
value and remedy; nothing here waits for JAX.
"""

import importlib.util
import os
import pathlib
import sys
import traceback
import types
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from rspo_jax.config import cli, identity, names
from rspo_jax.config.cli import Option

MODES = ("train", "eval")


def _installed() -> pathlib.Path:
  """Where `pip install` put the configs (pyproject.toml, data-files).

  `share` lies above the package: in an environment's prefix, in the user's
  (`--user`), which is not sys.prefix, or beside it (`--target`).
  """
  places = [
    folder / "share" / "rspo_jax"
    for folder in pathlib.Path(__file__).parents[2:]
  ]
  return next((p for p in places if (p / "configs").is_dir()), places[0])


INSTALLED = _installed()


CONFIG = Option(
  "--config=FILE[:ARG,...]",
  "config file; ARGs are listed in its docstring",
  example="configs/countdown.py",
)
PARSER = cli.Parser(
  "python -m rspo_jax.main --config=FILE[:ARG,...] [options]",
  [
    CONFIG,
    Option(cli.OVERRIDE, "override of one key (docs/configs.md)"),
    Option(
      "--workdir=DIR",
      "where the run is kept; the same DIR goes on (default: "
      "runs/<config>-<hash of the config>)",
    ),
    Option(
      "--mode=MODE",
      "a run, or an evaluation of model.path or DIR's last checkpoint",
      "train",
      choices=MODES,
    ),
  ],
  "exit status: 0 done, 2 mistake in the command, 3 fault of the run, 75 "
  "interrupted after saving: run the same command to go on.",
)


def parse(argv: list[str]):
  """(config, name of the config file, workdir or "", mode) of a command line.

  Raises:
    ValueError: one message with value and remedy.
  """
  options = PARSER.read(argv[1:])
  config = resolve(options.config, options.overrides)
  name = pathlib.Path(options.config.partition(":")[0]).stem
  return config, name, options.workdir, options.mode


def resolve(text: str, overrides: Mapping[str, str]):
  """The config of FILE[:ARG,...] with overrides, text by key; locked.

  Raises:
    ValueError: one message with value and remedy.
  """
  config = load_config(text)
  for key, value in overrides.items():
    override(config, key, value)
  return config.lock()


def from_file(text: str, use: Callable[[types.ModuleType], Any]) -> Any:
  """What `use` makes of the Python file of a --config=FILE[:ARG,...].

  Raises:
    ValueError: no such file, or whatever it or `use` raised.
  """
  path = text.partition(":")[0]
  if not os.path.isfile(path) and (INSTALLED / path).is_file():
    path = str(INSTALLED / path)
  _make_configs_importable(path)
  if not os.path.isfile(path):
    known = map(str, pathlib.Path(path).parent.glob("*.py"))
    raise ValueError(
      f"--config={path} is not a file; "
      f"{names.did_you_mean(path, known, str)}see --help."
    )
  spec = importlib.util.spec_from_file_location("rspo_jax_config_file", path)
  if spec is None:
    raise ValueError(f"--config={path} must be a Python file (*.py).")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    return use(module)
  except Exception as error:  # a config file is a program of the caller's
    raise ValueError(f"--config={text}: {_cause(error, path)}") from error


def load_config(text: str) -> ml_collections.ConfigDict:
  """The config of FILE[:ARG,...].

  Raises:
    ValueError: no such file, a file that fails, or one with other keys than
      configs/base.py.
  """
  path, colon, arg = text.partition(":")
  given = [arg] if colon else []
  config = from_file(text, lambda module: module.get_config(*given))
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
    if not key.startswith(identity.OPEN_GROUP):
      raise ValueError(
        f"--config={path} sets {key}, which is not a key of "
        "rspo_jax/config/schema.py."
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
  if key.startswith(identity.OPEN_GROUP) and key not in values:
    values[key] = 0.0
  if key not in values:
    inside = [k for k in values if k.startswith(f"{key}.")]
    if inside:
      raise ValueError(
        f"--config.{key} is a group; set one of its keys: {', '.join(inside)}."
      )
    known = [f"--config.{k}" for k in values]
    near = names.did_you_mean(f"--config.{key}", known, str)
    raise ValueError(
      f"--config.{key} is not a key of the config; {near}see --help."
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
