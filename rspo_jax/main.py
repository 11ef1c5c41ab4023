"""Entry point: flags, several processes, exit status.

    python -m rspo_jax.main --config=configs/countdown.py --workdir=DIR

Exit status: 0 done, 2 the caller's mistake, 3 a fault of the run, 75
interrupted after saving (the same command goes on).
"""

import os
import pathlib
import sys

from absl import flags
from ml_collections import config_flags

MISTAKE = 2
HELP = """usage: python -m rspo_jax.main --config=FILE[:ARG,...] [options]

  --config=configs/countdown.py   config file; ARGs are listed in its docstring
  --config.GROUP.KEY=VALUE        override of one key (configs/base.py)
  --workdir=DIR                   where the run is kept; the same DIR goes on
                                  (default: runs/<config>-<hash of the config>)
  --mode=train|eval               train, or evaluate model.path or DIR's last
                                  checkpoint on eval.split

exit status: 0 done, 2 mistake in the command, 3 fault of the run,
75 interrupted after saving: run the same command to go on."""


def parse(argv: list[str]):
  """(config, name of the config file, workdir or "", mode) of a command line.

  Raises:
    ValueError: one message with value and remedy.
  """
  values = flags.FlagValues()
  flags.DEFINE_string("workdir", "", "Folder.", flag_values=values)
  flags.DEFINE_enum(
    "mode", "train", ["train", "eval"], "What to do.", flag_values=values
  )
  flag = config_flags.DEFINE_config_file("config", None, flag_values=values)
  given = [a for a in argv[1:] if a.startswith(("--config=", "-config="))]
  if not given and "--config" not in argv:
    raise ValueError(
      "--config is missing; try --config=configs/countdown.py (or --help)."
    )
  try:
    rest = values(argv)
    config = flag.value
    config.lock()
  except (
    flags.Error,
    AttributeError,
    KeyError,
    ValueError,
    TypeError,
    OSError,
    ImportError,
  ) as error:
    raise ValueError(explain(error, values)) from error
  if len(rest) > 1:
    raise ValueError(f"{rest[1]!r} is not an option; options start with --.")
  path = config_flags.get_config_filename(values["config"])
  name = pathlib.Path(path.split(":")[0]).stem
  return config, name, values.workdir, values.mode


def explain(error: Exception, values) -> str:
  """One line for whatever the flags library says, with the nearest key."""
  import difflib
  import re

  text = " ".join(str(error).split()) or type(error).__name__
  match = re.search(r"Unknown command line flag '(config\.)?([\w.]+)'", text)
  match = match or re.search(r"(KeyError:|no attribute) ['\"]()([\w.]+)", text)
  known = [name for name in values if isinstance(name, str)]
  try:
    from rspo_jax import settings

    config = settings.flat(values["config"].value.to_dict())
    known += [f"config.{key}" for key in config]
  except Exception:  # the config itself could not be read: flags alone
    config = {}
  asked = re.findall(r"config\.[\w.]+|'(\w+)'", text)
  if match:
    asked = [(match.group(1) or "") + match.group(2)]
  near = [
    name
    for word in asked
    for name in difflib.get_close_matches(word, known, 1, 0.6)
  ]
  return text + (f" Did you mean --{near[0]}?" if near else "")


def main(argv: list[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  argv = list(sys.argv if argv is None else argv)
  if any(a in ("--help", "-h", "-help", "--helpfull") for a in argv[1:]):
    print(HELP)
    return 0
  try:
    config, name, workdir, mode = parse(argv)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return MISTAKE
  from rspo_jax import settings

  if not workdir:
    digest = settings.config_hash(config.to_dict())
    workdir = os.path.join("runs", f"{name}-{digest}")
  print(f"{mode}: {name} in {workdir}", flush=True)
  from rspo_jax import train

  return train.main(config, workdir, mode)


if __name__ == "__main__":
  sys.exit(main())
