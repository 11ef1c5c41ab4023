"""Writes docs/configs.md from configs/base.py and the config files.

    python docs/make_configs.py

Defaults are read from the config itself, meanings from the comments beside
the keys, switches from the config files.
"""

import importlib
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "configs.md"
sys.path.insert(0, str(ROOT))

from rspo_jax.config import identity  # noqa: E402

# They switch between config files and are none themselves.
NO_CONFIGS = ("__init__", "base", "recipes")


def comments(source: str) -> dict[str, str]:
  """The comment of each `group.key = value` line by "alias.key", in order.

  A comment stands behind the value and goes on in lines whose text is indented
  under it. Where a key has none, the lines of comment right before it speak.
  """
  found: dict[str, str] = {}
  key, before = None, ""
  for line in source.splitlines():
    assigned = re.match(r"  ([a-z0-9_]+(?:\.[a-z0-9_]+)+) = ", line)
    more = re.match(r"  #\s{3,}(.*)", line)
    if more and key:
      found[key] = f"{found[key]} {more.group(1)}".strip()
    elif assigned:
      key = assigned.group(1)
      found[key] = line.partition("  # ")[2].strip() or before
      before = ""
    elif comment := re.match(r"  # (.*)", line):
      key, before = None, f"{before} {comment.group(1)}".strip()
    else:
      key, before = None, ""
  return found


# Groups that have a shorter name in the file.
ALIASES = {"eval": "evaluation", "model.new": "new"}


def alias(key: str) -> str:
  """A key as the file writes it."""
  group, _, name = key.rpartition(".")
  return f"{ALIASES.get(group, group)}.{name}"


def switches(name: str) -> tuple[str, list[str]]:
  """First line of a config's docstring, and the arguments that it takes."""
  module = importlib.import_module(f"configs.{name}")
  summary = (module.__doc__ or "").strip().splitlines()[0]
  try:
    module.get_config("no_such_switch")
  except ValueError as error:
    named = str(error).partition("choose from ")[2].rstrip(".")
    return summary, named.split(", ")
  return summary, []


def page() -> str:
  """The text of docs/configs.md."""
  base = importlib.import_module("configs.base")
  said = comments((ROOT / "configs" / "base.py").read_text("utf-8"))
  values = identity.flat(base.get_config().to_dict())
  lines = [
    "# Configs",
    "",
    "Written by `python docs/make_configs.py` from `configs/`; do not edit. "
    "`--config.GROUP.KEY=VALUE` overrides one key.",
    "",
    "## Files",
    "",
    "`--config=configs/FILE.py:ARG,ARG` picks arguments: models first, in whatever order they stand; of the others the last one wins.",
    "",
    "| file | what | arguments |",
    "|---|---|---|",
  ]
  for path in sorted((ROOT / "configs").glob("*.py")):
    if path.stem in NO_CONFIGS:
      continue
    module = importlib.import_module(f"configs.{path.stem}")
    if not hasattr(module, "get_config"):
      continue
    summary, found = switches(path.stem)
    listed = ", ".join(f"`{name}`" for name in found)
    lines.append(f"| `configs/{path.name}` | {summary} | {listed} |")
  groups: dict[str, list[str]] = {}
  places = list(said)
  for key in sorted(values, key=lambda key: places.index(alias(key))):
    groups.setdefault(key.partition(".")[0], []).append(key)
  for group, keys in groups.items():
    lines += [
      "",
      f"## {group}",
      "",
      "| key | default | meaning |",
      "|---|---|---|",
    ]
    for key in keys:
      value = values[key]
      shown = f'"{value}"' if isinstance(value, str) else str(value)
      cells = (f"`{key}`", f"`{shown}`", said[alias(key)])
      lines.append(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
      )
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  PAGE.write_text(page(), encoding="utf-8")
