"""Nothing that is read is ever executed: SECURITY.md, held to the source."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = sorted(
  path
  for folder in ("rspo_jax", "configs", "launch", "benchmarks")
  for path in (ROOT / folder).rglob("*.py")
)
# They execute what they load.
LOADERS = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
CALLS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {("os", "system"), ("os", "popen"), ("yaml", "load")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.name))
def test_no_source_can_execute_what_it_reads(path):
  for node in ast.walk(ast.parse(path.read_text())):
    where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
    if isinstance(node, ast.Import):
      roots = {alias.name.split(".")[0] for alias in node.names}
      assert not roots & LOADERS, where
    elif isinstance(node, ast.ImportFrom):
      assert (node.module or "").split(".")[0] not in LOADERS, where
    elif isinstance(node, ast.Call):
      if isinstance(node.func, ast.Name):
        assert node.func.id not in CALLS, where
      elif isinstance(node.func, ast.Attribute):
        owner = getattr(node.func.value, "id", "")
        assert (owner, node.func.attr) not in ATTRIBUTES, where
      for keyword in node.keywords:
        unsafe = keyword.arg in ("allow_pickle", "shell", "trust_remote_code")
        assert not unsafe or keyword.value.value is False, where


def test_what_security_md_names_exists():
  text = (ROOT / "SECURITY.md").read_text()
  names = {word.strip("`(),;") for word in text.split() if ".py`" in word}
  assert len(names) >= 5
  for name in names:
    assert any(
      (folder / name).exists() for folder in (ROOT, ROOT / "rspo_jax")
    ), name
