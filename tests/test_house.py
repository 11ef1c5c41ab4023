"""The shape of the code: sizes, and what it takes to add something."""

import ast
import contextlib
import dataclasses
import importlib
import pathlib
import re
import sys
import types

import pytest

from configs import base
from rspo_jax.config import keys, load, schema

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rspo_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# Run by hand, so that nothing else would tell that a name has moved.
SCRIPTS = sorted(
  path
  for folder in ("benchmarks", "launch", "docs")
  for path in (ROOT / folder).glob("*.py")
)

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


def trees(path):
  """Syntax trees of a file, and of the programs that lie in it as text."""
  yield (whole := ast.parse(path.read_text()))
  for node in ast.walk(whole):
    if isinstance(node, ast.Constant) and "\nimport " in str(node.value):
      with contextlib.suppress(SyntaxError):
        yield ast.parse(node.value)


def imported(tree):
  """(name in the file, what it is) of what a tree imports from the package."""
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and node.module.startswith("rspo_jax"):
      for each in node.names:
        owner = importlib.import_module(node.module)
        if not hasattr(owner, each.name):
          importlib.import_module(f"{node.module}.{each.name}")
        yield each.asname or each.name, getattr(owner, each.name)


@pytest.mark.parametrize(
  "path", SCRIPTS, ids=lambda p: f"{p.parent.name}-{p.name}"
)
def test_a_script_names_only_what_the_package_has(path):
  for tree in trees(path):
    modules = {
      name: value
      for name, value in imported(tree)
      if isinstance(value, types.ModuleType)
    }
    own = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    for node in ast.walk(tree):
      if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        own.add(node.id)
    for node in ast.walk(tree):
      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        name = node.value.id
        if name in modules and name not in own:
          assert hasattr(modules[name], node.attr), f"{name}.{node.attr}"


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
