"""The canonical files, fetched once from a server of our own."""

import dataclasses
import functools
import hashlib
import http.server
import json
import threading

import pytest

from rspo_jax.config import schema
from rspo_jax.datasets import downloads
from rspo_jax.run import data
from rspo_jax.tasks import TASKS, base

ROWS = {
  "gsm8k": [
    {"question": f"{i}?", "answer": f"<<{i}={i}>>\n#### {i}"} for i in range(40)
  ],
  "math500": [
    {"problem": f"{i}?", "answer": f"{i}", "level": 2} for i in range(40)
  ],
}


class Quiet(http.server.SimpleHTTPRequestHandler):
  """Serves a folder and counts what was asked for."""

  asked: list

  def do_GET(self):
    self.asked.append(self.path)
    super().do_GET()

  def log_message(self, *_):
    pass


@pytest.fixture
def server(tmp_path, monkeypatch):
  """(folder of the server, paths asked of it); FILES point there."""
  folder = tmp_path / "served"
  folder.mkdir()
  asked = []
  handler = type("Handler", (Quiet,), {"asked": asked})
  serving = http.server.ThreadingHTTPServer(
    ("127.0.0.1", 0), functools.partial(handler, directory=str(folder))
  )
  thread = threading.Thread(target=serving.serve_forever, daemon=True)
  thread.start()
  files = {}
  for name, rows in ROWS.items():
    files[name] = {}
    for part in ("train", "test"):
      text = "".join(json.dumps(row) + "\n" for row in rows)
      (folder / f"{name}-{part}").write_text(text)
      files[name][part] = downloads.File(
        f"http://127.0.0.1:{serving.server_port}/{name}-{part}",
        len(rows),
        hashlib.sha256(text.encode()).hexdigest() if name == "gsm8k" else "",
      )
  monkeypatch.setattr(downloads, "FILES", files)
  yield folder, asked
  serving.shutdown()
  serving.server_close()


@pytest.mark.parametrize("name", ["gsm8k", "math500"])
def test_a_task_without_a_source_reads_the_published_files(
  name, server, tmp_path
):
  settings = schema.Data(dir=str(tmp_path / "data"))
  splits = {
    split: data.load_examples(TASKS[name], split, settings)
    for split in base.SPLITS
  }
  questions = {
    split: {example["question"] for example in examples}
    for split, examples in splits.items()
  }
  assert len(questions["test"]) == 40
  assert not questions["train"] & questions["validation"]
  assert len(questions["train"] | questions["validation"]) == 40
  assert sorted(server[1]) == [f"/{name}-test", f"/{name}-train"]
  label = TASKS[name].difficulty(splits["test"][0])
  assert label == {"gsm8k": "1 steps", "math500": "level 2"}[name]


@pytest.mark.parametrize(
  ("name", "damage", "said"),
  [
    ("gsm8k", lambda text: text.replace("3", "4", 1), "the digest"),
    ("math500", lambda text: text[: len(text) // 2], "rows, not the 40"),
    ("math500", None, "Not Found|404|cannot be downloaded"),
  ],
)
def test_what_is_not_the_published_file_is_refused_and_not_kept(
  name, damage, said, server, tmp_path
):
  path = server[0] / f"{name}-test"
  if damage is None:
    path.unlink()
  else:
    path.write_text(damage(path.read_text()))
  settings = schema.Data(dir=str(tmp_path / "data"))
  with pytest.raises(data.DataError, match=said) as error:
    data.load_examples(TASKS[name], "test", settings)
  assert "data.source=PATH" in str(error.value)
  assert not list((tmp_path / "data").rglob("*.jsonl"))
  assert not list((tmp_path / "data").rglob("*.part"))


def test_without_a_network_the_remedy_is_named(server, tmp_path, monkeypatch):
  file = dataclasses.replace(
    downloads.FILES["gsm8k"]["test"], url="http://127.0.0.1:1/test.jsonl"
  )
  monkeypatch.setitem(downloads.FILES["gsm8k"], "test", file)
  settings = schema.Data(dir=str(tmp_path))
  with pytest.raises(
    data.DataError, match=r"cannot be downloaded.*data\.source"
  ):
    data.load_examples(TASKS["gsm8k"], "test", settings)


def test_the_digests_are_those_of_the_published_files(shared):
  for part, file in downloads.FILES["gsm8k"].items():
    content = (shared / f"data/gsm8k_{part}.jsonl").read_bytes()
    assert hashlib.sha256(content).hexdigest() == file.sha256
    assert content.count(b"\n") == file.rows


def test_unreadable_answers_of_the_training_file_are_left_out_and_said(
  server, tmp_path
):
  rows = [*ROWS["math500"][:39], {"problem": "?", "answer": "{"}]
  text = "".join(json.dumps(row) + "\n" for row in rows)
  for part in ("train", "test"):
    (server[0] / f"math500-{part}").write_text(text)
  settings = schema.Data(dir=str(tmp_path / "data"))
  counts = []
  with pytest.warns(UserWarning, match=r"1 of \d+ rows are left out.*'\{'"):
    for split in ("train", "validation"):
      counts.append(len(TASKS["math500"].load(split, settings)))
  assert sum(counts) == 39
  with pytest.raises(ValueError, match=r"test\.jsonl:40: the answer '\{'"):
    TASKS["math500"].load("test", settings)
