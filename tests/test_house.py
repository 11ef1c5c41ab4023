"""The shape of the code: sizes, and what it takes to add something."""

import ast
import dataclasses
import pathlib
import re
import sys

import pytest

from configs import base
from rspo_jax.config import keys, load, schema

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rspo_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))

LINES_OF_A_FILE = 500
LINES_OF_A_CLASS = 250
LINES_OF_A_FUNCTION = 80


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.name))
def test_no_file_class_or_function_is_too_long_to_be_read(path):
  text = path.read_text()
  assert len(text.splitlines()) <= LINES_OF_A_FILE
  for node in ast.walk(ast.parse(text)):
    limit = {
      ast.ClassDef: LINES_OF_A_CLASS,
      ast.FunctionDef: LINES_OF_A_FUNCTION,
      ast.AsyncFunctionDef: LINES_OF_A_FUNCTION,
    }.get(type(node))
    if limit:
      assert node.end_lineno - node.lineno < limit, node.name


def test_the_package_opens_with_its_rooms():
  assert len(list(PACKAGE.glob("*.py"))) <= 4


def test_every_page_is_listed_once():
  listed = re.findall(
    r"\]\(([\w.]+\.md)\)", (ROOT / "docs/README.md").read_text()
  )
  pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
  assert sorted(listed) == sorted(pages)


def test_a_key_is_added_by_one_line(monkeypatch):
  run = dataclasses.make_dataclass(
    "Run",
    [("patience", int, keys.key(3, "steps without news", at_least=1))],
    bases=(schema.Run,),
    frozen=True,
  )
  config = dataclasses.make_dataclass(
    "Config",
    [("run", run, dataclasses.field(default_factory=run))],
    bases=(schema.Config,),
    frozen=True,
  )
  monkeypatch.setattr(schema, "Config", config)
  values = base.get_config()
  assert values.run.patience == 3
  load.override(values, "run.patience", "0")
  with pytest.raises(ValueError, match=r"run\.patience=0 must be at least 1"):
    keys.check_values(keys.typed(values.to_dict(), config))
  with pytest.raises(ValueError, match=r"did you mean --config\.run\.patience"):
    load.override(values, "run.patienc", "1")
  monkeypatch.syspath_prepend(str(ROOT / "docs"))
  import make_configs

  assert "| `run.patience` | `3` | steps without news |" in make_configs.page()
  sys.modules.pop("make_configs")
