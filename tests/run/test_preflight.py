"""A run that cannot have the memory or the disk it needs is not begun."""

import json

import jax
import pytest
import tiny_runs

from configs import countdown
from rspo_jax import main
from rspo_jax.devices import sharding
from rspo_jax.models import families
from rspo_jax.run import loading, preflight, settings
from rspo_jax.run import program as program_lib

pytestmark = pytest.mark.usefixtures("quick_runs")

# LLaDA-8B: 32 layers of 4 square and 3 wide matrices and 2 norms, embedding and
# head of 126,464 rows, one last norm.
WIDTH, MLP, ROWS = 4096, 12288, 126464
PARAMETERS = (
  32 * (4 * WIDTH * WIDTH + 3 * WIDTH * MLP + 2 * WIDTH)
  + 2 * ROWS * WIDTH
  + WIDTH
)


def test_memory_of_a_large_model_is_known_without_its_weights(tiny):
  config = countdown.get_config()
  config.model.path = str(tiny.checkpoint)
  config.data.prompt_length = 256
  built = settings.build(config, 1)
  mesh = sharding.make_mesh()
  shape = families.PUBLISHED["llada_8b"]
  model = loading.abstract_model(built, shape, mesh)
  need = preflight.resident_bytes(program_lib.assemble(built, model, mesh))
  # Reference, policy, two moments and the gradient; three counters.
  assert 0 <= need - 5 * 4 * PARAMETERS < 64


def test_a_model_that_is_too_large_is_refused_before_its_weights_are_read(
  tiny, tmp_path, monkeypatch, capsys
):
  # A file that is long and empty: reading it would be an error of its own.
  folder = tmp_path / "large"
  folder.mkdir()
  shape = json.loads((tiny.checkpoint / "config.json").read_text())
  shape |= {
    "d_model": WIDTH,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": MLP,
    "embedding_size": ROWS,
    "vocab_size": ROWS,
  }
  (folder / "config.json").write_text(json.dumps(shape))
  with open(folder / "model.safetensors", "wb") as file:
    file.truncate(16 << 30)
  monkeypatch.setattr(preflight, "device_bytes", lambda: 64 << 30)
  assert main.main(tiny(tmp_path / "run", model__path=folder)) == 2
  error = capsys.readouterr().err
  assert f"{20 * PARAMETERS / 1e9:.3g} GB" in error and "68.7 GB" in error
  assert "mesh.fsdp" in error and error.count("\n") == 1
  assert not (tmp_path / "run").exists()


def test_a_disk_that_the_checkpoints_would_fill_is_refused(
  whole, tiny, tmp_path, monkeypatch, capsys
):
  program = tiny_runs.program_of(tiny("unused"))
  state = tiny_runs.newest(whole, program).state["train"]
  one = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  model = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
  # The newest three, one that is being written, and model/.
  monkeypatch.setattr(preflight, "free_bytes", lambda _: 4 * one + model - 1)
  assert main.main(tiny(tmp_path / "run")) == 2
  error = capsys.readouterr().err
  assert "4 checkpoints" in error and "run.keep_checkpoints=3" in error
  assert not (tmp_path / "run").exists()
  monkeypatch.setattr(preflight, "free_bytes", lambda _: 4 * one + model)
  preflight.check_disk(program, tmp_path / "run")
  # A run that goes on writes over what it has.
  monkeypatch.setattr(preflight, "free_bytes", lambda _: one + model)
  preflight.check_disk(program, whole)


def test_this_machine_has_memory_and_disk(tmp_path):
  assert preflight.device_bytes() > 1 << 28
  free = preflight.free_bytes(tmp_path / "not" / "there" / "yet")
  assert free > 0
