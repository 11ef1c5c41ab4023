"""Files appear whole or not at all; a lock keeps others out."""

import os
import stat

import pytest

from rspo_jax.storage import files


@pytest.mark.parametrize("content", ["gr\u00fcn\n", b"\x00\xff"])
def test_a_file_has_what_was_written_and_nothing_lies_beside_it(
  tmp_path, content
):
  path = tmp_path / "file"
  for _ in range(2):
    files.write(path, content)
    written = content if isinstance(content, bytes) else content.encode()
    assert path.read_bytes() == written
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("before", [None, b"before"])
@pytest.mark.parametrize("failing", ["block", "fsync", "replace"])
def test_a_failure_at_any_moment_leaves_the_file_that_was_there(
  tmp_path, monkeypatch, before, failing
):
  path = tmp_path / "file"
  if before is not None:
    path.write_bytes(before)

  def no_room(*_):
    raise OSError(28, "No space left on device")

  if failing != "block":
    monkeypatch.setattr(os, failing, no_room)
  with (
    pytest.raises(OSError, match="No space left"),
    files.replacing(path) as file,
  ):
    file.write(b"after")
    if failing == "block":
      no_room()
  left = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
  assert left == ({} if before is None else {"file": before})


def test_permissions_are_those_of_the_file_before_or_of_the_process(tmp_path):
  mask = os.umask(0o027)
  try:
    files.write_json(tmp_path / "new", {})
    (tmp_path / "old").write_text("")
    (tmp_path / "old").chmod(0o604)
    files.write_json(tmp_path / "old", {"b": 1, "a": [2]})
  finally:
    os.umask(mask)
  modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
  assert modes == {"new": 0o640, "old": 0o604}
  assert (tmp_path / "old").read_text() == (
    '{\n  "a": [\n    2\n  ],\n  "b": 1\n}\n'
  )


def test_a_lock_keeps_others_out_until_it_is_closed(tmp_path):
  with (tmp_path / "lock").open("a") as one, (tmp_path / "lock").open() as two:
    assert files.lock(one)
    assert not files.lock(two)
    one.close()
    assert files.lock(two)
