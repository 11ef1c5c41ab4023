"""The demo: what it shows is what the sampler does; the page stays at home."""

import http.client
import itertools
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import rspo_jax
from rspo_jax import demo, demo_web


@pytest.fixture(scope="module")
def session():
  import tiny_runs

  with tiny_runs.quick():
    yield demo.Session("embedded:countdown")


@pytest.mark.parametrize(
  "options",
  [
    {"steps": 4},
    {"block": 4, "steps": 8, "cache": "dual", "threshold": 0.5},
    {"temperature": 1.0},
  ],
)
def test_what_is_shown_is_what_generate_does(session, options):
  settings = session.check(**options)
  canvases = []
  answer = session.answer("3,5,7=56", settings, 3, canvases.append)
  ids = session.model.tokenizer.encode("3,5,7=56")
  pad = -len(ids) % 8
  out = rspo_jax.generate(
    session.model,
    np.array([[session.model.config.pad_id] * pad + ids]),
    np.array([[0] * pad + [1] * len(ids)]),
    gen_length=8,
    steps=options.get("steps", 8),
    block_length=options.get("block", 8),
    temperature=options.get("temperature", 0.0),
    cache=options.get("cache", "none"),
    threshold=options.get("threshold"),
    mask_policy="forbid",
    seed=3,
  )
  kept = len(answer.commit_step)
  assert answer.commit_step == out.commit_step[0, :kept].tolist()
  assert answer.forwards == out.denoiser_calls == len(canvases) - 1
  completion = out.tokens[0, -8:]
  assert answer.pieces == [
    session.model.tokenizer.decode([t], skip_special=False)
    for t in completion[:kept]
  ]
  # A canvas a forward: what forward f wrote is there from canvas f + 1 on.
  for forward, canvas in enumerate(canvases):
    written = [piece is not None for piece in canvas]
    assert written == (out.commit_step[0] < forward).tolist()
  for one, other in itertools.pairwise(canvases):
    assert all(a in (None, b) for a, b in zip(one, other, strict=True))


def test_prompts_of_a_task_are_judged_and_others_refused(session):
  example, text = session.read(" 3,5,7=56 ")
  assert example == {"ground_truth": [[3, 5, 7], 56]} and text == "3,5,7=56"
  assert session.verdict(example, "(3+5)*7")["correct"]
  assert not session.verdict(example, "3+5*7")["correct"]
  assert session.verdict(None, "anything") is None
  for prompt in ("", "hello", "x" * 5000):
    with pytest.raises(ValueError):
      session.read(prompt)
  assert len(session.examples) == demo.EXAMPLES
  for prompt in session.examples:
    assert session.read(prompt)[0] is not None


def test_a_sudoku_is_solved_so_that_it_can_be_judged():
  example = demo.example_of("sudoku", "0241 0003 1002 2000")
  puzzle, grid = example["puzzle"], example["ground_truth"]
  assert all(a in ("0", b) for a, b in zip(puzzle, grid, strict=True))
  cells = np.array(list(grid)).reshape(2, 2, 2, 2)  # box row, row, ...
  for axes in ((0, 1, 2, 3), (2, 3, 0, 1), (0, 2, 1, 3)):
    units = cells.transpose(axes).reshape(4, 4)
    assert all(set(unit) == set("1234") for unit in units)
  with pytest.raises(ValueError, match="no solution"):
    demo.example_of("sudoku", "1100000000000000")
  assert demo.example_of("sudoku", "12345") is None


def test_a_model_of_a_run_knows_its_task(tmp_path):
  (tmp_path / "config.json").write_text('{"task": {"name": "sudoku"}}')
  assert demo.task_of("x", str(tmp_path / "model")) == "sudoku"
  (tmp_path / "config.json").write_text('{"task": {"name": "own:score"}}')
  assert demo.task_of("x", str(tmp_path / "model")) == "none"
  assert demo.task_of("x", str(tmp_path / "nowhere" / "model")) == "none"


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (["--model=nowhere"], "not a folder"),
    (["--model=embedded:sudoko"], "embedded:sudoku"),
    (["--setps=3"], "did you mean --steps?"),
    (["--steps=three"], "--help"),
    (["--seed=-1"], "0 .. 2**31"),
    (["--task=chess"], "countdown"),
    (["--length=100"], "between 1 and 63"),
    (["--block=3"], "use 2 or 4"),
    (["--steps=9"], "at most 8"),
    (["--threshold=-2"], "positive"),
    (["--cache=all"], "prefix"),
    (["--temperature=-1"], "0 or more"),
    (["--prompt=hello"], "countdown alone"),
    (["--prompt=" + ",".join(["999"] * 8) + "=999999999"], "vocabulary"),
  ],
)
def test_a_mistake_is_named_with_its_remedy(
  words, said, session, capsys, monkeypatch
):
  monkeypatch.setattr(demo, "Session", lambda *_: session)
  assert demo.main(words) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ") and error.count("\n") == 1
  assert said in error


def test_the_terminal_shows_each_forward_and_the_verdict(
  session, capsys, monkeypatch
):
  monkeypatch.setattr(demo, "Session", lambda *_: session)
  assert demo.main(["--prompt=25,56,11=92", "--steps=4"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[1] == "prompt 25,56,11=92"
  assert lines[2].split() == ["0", "\u25af" * 8]
  assert [line.count("\u25af") for line in lines[2:7]] == [8, 6, 4, 2, 0]
  assert lines[7].startswith("answer ")
  assert lines[8].startswith(("right: ", "wrong: "))


def test_the_first_line_does_not_wait_for_jax():
  code = "import sys, rspo_jax.demo; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0
  assert demo.main(["--help"]) == 0


# The page.


@pytest.fixture(scope="module")
def server(session):
  found = demo_web.Server(session, 0)
  thread = threading.Thread(target=found.serve_forever, daemon=True)
  thread.start()
  yield found
  found.shutdown()
  found.server_close()
  thread.join()


def ask(server, method, path, body=None, **headers):
  """(status, body) of a request."""
  port = server.server_address[1]
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
  if isinstance(body, dict):
    body = json.dumps(body)
    headers.setdefault("Content-Type", "application/json")
  headers = {key.replace("_", "-"): value for key, value in headers.items()}
  connection.request(method, path, body, headers)
  answer = connection.getresponse()
  text = answer.read().decode()
  connection.close()
  return answer.status, text


def test_the_server_listens_to_this_machine_alone(server):
  assert server.server_address[0] == "127.0.0.1"
  status, text = ask(server, "GET", "/")
  assert status == 200 and "http:" not in text and "https:" not in text
  for headers in (
    {"Host": "example.com"},
    {"Origin": "http://example.com"},
    {"Origin": "null"},
  ):
    for method, path in (("GET", "/"), ("POST", "/api/denoise")):
      assert ask(server, method, path, {"prompt": "1"}, **headers)[0] == 403


def test_the_page_is_told_of_the_model(server, session):
  status, text = ask(server, "GET", "/api/model")
  told = json.loads(text)
  assert status == 200
  assert told["task"] == "countdown" and told["length"] == 8
  assert told["examples"] == session.examples
  assert ask(server, "GET", "/../demo.py")[0] == 404
  assert ask(server, "POST", "/", {"prompt": "1"})[0] == 404


def test_forwards_come_as_lines_and_the_answer_last(server, session):
  body = {"prompt": "25,56,11=92", "steps": 4, "seed": 1, "threshold": None}
  status, text = ask(server, "POST", "/api/denoise", body)
  assert status == 200
  *forwards, answer = [json.loads(line) for line in text.splitlines()]
  assert [item["forward"] for item in forwards] == list(range(5))
  pieces = [None] * 8
  for item in forwards:
    for place, piece in item["placed"].items():
      pieces[int(place)] = piece
  alone = session.answer("25,56,11=92", session.check(steps=4), 1, len)
  assert answer["text"] == alone.text and answer["verdict"] == alone.verdict
  assert "".join(pieces).replace("\u220e", "") == alone.text


@pytest.mark.parametrize(
  ("body", "said"),
  [
    ("{", "Expecting"),
    ("[]", "JSON object"),
    ("[" * 20_000, "recursion"),
    ({"prompt": 3}, "prompt"),
    ({"prompt": "1,2,3=6", "steps": "8"}, "steps must be a number"),
    ({"prompt": "1,2,3=6", "steps": 2.5}, "whole"),
    ({"prompt": "1,2,3=6", "steps": True}, "number"),
    ({"prompt": "1,2,3=6", "steps": 10**9}, "at most 8"),
    ({"prompt": "1,2,3=6", "length": 10**6}, "between"),
    ({"prompt": "1,2,3=6", "seed": 2**40}, "seed"),
    ({"prompt": "1,2,3=6", "cache": ["none"]}, "cache"),
    ({"prompt": "1,2,3=6", "cfg_scale": 1.0}, "not a field"),
    ({"prompt": "x" * 4001}, "characters"),
    ({"prompt": "x" * 40_000}, "bytes"),
    ('{"prompt": "1,2,3=6", "temperature": 1e999}', "finite"),
  ],
)
def test_a_request_out_of_bounds_is_refused(server, body, said):
  headers = {"Content-Type": "application/json"}
  status, text = ask(server, "POST", "/api/denoise", body, **headers)
  assert status == 400
  assert said in json.loads(text)["error"]


def test_a_form_of_another_page_cannot_send_a_request(server):
  for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
    status, _ = ask(
      server, "POST", "/api/denoise", '{"prompt": "1,2,3=6"}', Content_Type=kind
    )
    assert status == 400


def test_whoever_leaves_does_not_stop_the_next(server):
  port = server.server_address[1]
  for _ in range(3):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = json.dumps({"prompt": "25,56,11=92", "steps": 4})
    connection.request(
      "POST", "/api/denoise", body, {"Content-Type": "application/json"}
    )
    connection.close()
  body = {"prompt": "25,56,11=92", "steps": 4}
  assert ask(server, "POST", "/api/denoise", body)[0] == 200


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_denoises_and_tells_the_verdict(server, browser, dark):
  home = f"http://127.0.0.1:{server.server_address[1]}/"
  browser.open(home, width=390, height=844, dark=dark)
  browser.run(
    "new Promise(done => { const look = () => "
    "document.getElementById('go').disabled ? setTimeout(look, 20) : done(); "
    "look(); })"
  )
  browser.run("document.getElementById('pace').value = 0")
  browser.run("document.getElementById('steps').value = 4")
  browser.run("document.getElementById('form').requestSubmit()")
  found = browser.run(
    "new Promise(done => { const look = () => { const text = "
    "document.getElementById('verdict').textContent; text ? done(text) : "
    "setTimeout(look, 50); }; look(); })"
  )
  assert found.startswith(("right: ", "wrong: "))
  shown = "document.querySelectorAll('#canvas span:not(.block)').length"
  assert browser.run(shown) == 8
  assert browser.run("document.documentElement.scrollWidth") <= 390
  assert browser.complaints((home, "data:")) == []


def test_a_port_that_is_taken_is_named(server, session, capsys):
  port = server.server_address[1]
  assert demo_web.serve(session, port) == 2
  assert f"--port={port}" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
def test_a_terminal_gets_its_cursor_back():
  ours, theirs = os.openpty()
  child = subprocess.Popen(
    [
      sys.executable,
      "-c",
      "import sys; from rspo_jax.demo import Screen\n"
      "with Screen(sys.stdout, 0.0) as screen:\n"
      "  screen.tell([None, None]); screen.tell(['[b]', None])",
    ],
    stdout=theirs,
    env={**os.environ, "TERM": "xterm"},
  )
  os.close(theirs)
  shown = b""
  try:
    while data := os.read(ours, 4096):
      shown += data
  except OSError:  # how a pty says that it is closed
    pass
  os.close(ours)
  assert child.wait() == 0
  assert b"[b]" in shown
  assert shown.count(b"\x1b[?25l") == shown.count(b"\x1b[?25h") == 1
