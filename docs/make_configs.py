"""Writes docs/configs.md from the schema of keys and the config files.

    python docs/make_configs.py

Defaults and meanings are those of rspo_jax/config/schema.py; the switches are
asked of the config files.
"""

import importlib
import pathlib
import sys
from collections.abc import Mapping

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "configs.md"
sys.path.insert(0, str(ROOT))

from rspo_jax.config import keys, schema  # noqa: E402

# They switch between config files and are none themselves.
NO_CONFIGS = ("__init__", "base", "recipes")


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
  group = ""
  for key, field, value in keys.walk(schema.Config()):
    if key.partition(".")[0] != group:
      group = key.partition(".")[0]
      lines += [
        "",
        f"## {group}",
        "",
        "| key | default | meaning |",
        "|---|---|---|",
      ]
    if isinstance(value, str):
      shown = f'"{value}"'
    else:
      shown = str(dict(value) if isinstance(value, Mapping) else value)
    meaning = field.metadata["meaning"].replace("|", "\\|")
    lines.append(f"| `{key}` | `{shown}` | {meaning} |")
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  PAGE.write_text(page(), encoding="utf-8")
