"""Plans: prices and estimates by hand, refusals before any compilation."""

import dataclasses
import importlib.util
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rspo_jax.config import cli
from rspo_jax.devices import sharding
from rspo_jax.models import adapters, lora
from rspo_jax.planning import (
  chips,
  command,
  compiler,
  hlo,
  planner,
  prices,
  programs,
  table,
  workload,
)
from rspo_jax.run import compiled, settings

ROOT = pathlib.Path(__file__).resolve().parents[2]
COUNTDOWN = f"{ROOT}/configs/countdown.py"
V5E = chips.parse("v5e:2x2")

needs_compiler = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="the TPU compiler is not installed: pip install libtpu",
)


def forbidden(*_, **__):
  """Stands where nothing may be compiled."""
  raise AssertionError("the compiler was asked")


# --- Slices and seconds -----------------------------------------------------


def test_a_slice_is_named_with_its_sides_in_any_order():
  assert chips.parse("v5e:4x2") == chips.parse("v5e:2x4")
  assert chips.parse("v5p:1x2x2").name == "v5p:2x2x1"
  assert chips.parse("v6e:2x4").devices == 8


@pytest.mark.parametrize(
  ("text", "near"),
  [
    ("v5e:3x3", "v5e:2x4"),
    ("v5e:2x2x1", "v5e:2x2"),
    ("v5:2x2", "v5e:2x2"),
    ("v6:2x4", "v6e:2x4"),
    ("v5e", "v5e:2x2"),
    ("v5e:two", "v5e:2x2"),
    ("tpu9:2x2", "v5e"),
  ],
)
def test_a_slice_that_is_not_sold_is_refused_with_one_that_is(text, near):
  with pytest.raises(ValueError, match=near):
    chips.parse(text)


def test_the_compilers_refusal_says_how_much_was_needed():
  text = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, "
    "the total memory required for HLO temporaries (21.95G) exceeds available "
    "HBM (15.75G)."
  )
  assert compiler.out_of_memory(text) == int(21.95 * 2**30)
  assert compiler.out_of_memory("INTERNAL: something else") is None


def priced(useful=1.0, level="full", beside=None, **changes):
  """A row of a plan for four v5e chips."""
  measured = hlo.Measured(
    cycles=3e9,
    moved_bytes=8e9,
    wire_by_kind={
      "all-gather": hlo.Wire(90e9, 0.0, 4),
      "all-reduce": hlo.Wire(45e9, 45e9, 2),
    },
  )
  measured = dataclasses.replace(measured, **changes)
  sizes = dict(arguments=51e8, temporaries=25e8, outputs=5e9, aliased=5e9)
  result = {
    "memory": sizes | {"code": 0},
    "needed_bytes": 76e8,
    "flops": 4 * 1.5e14,
    "measured": dataclasses.asdict(measured),
    "compile_s": 1.0,
  }
  resident = beside or {"reference": 4e9}
  resident = {"weights": 2e9, "moments": 3e9} | resident
  call = programs.Call(None, (), 1, 1, ("weights", "moments"), useful)
  call.temporaries = {"gradients": 1e9}
  program = types.SimpleNamespace(mesh=types.SimpleNamespace(size=4))
  made = programs.Described(program, {"update": call}, resident, useful)
  return prices.price(made, V5E, "update", level, result)


def test_seconds_are_read_three_ways_and_mfu_counts_useful_flops():
  row = priced(4 * 1.2e14)
  compute, wire, blocking = 3e9 / V5E.chip.clock_hz, 1.5, 0.5
  expected = {
    "overlap": max(compute, wire),
    "sync": compute + blocking,
    "serial": compute + wire,
  }
  for name, seconds in expected.items():
    mfu = 1.2e14 / 197e12 / seconds
    assert row["readings"][name] == pytest.approx(
      {"seconds": seconds, "mfu": mfu}
    )
  assert row["seconds"] == row["readings"]["sync"]["seconds"]
  assert row["flops"] == 1.5e14 and row["collective_gb"] == 135


def test_a_program_fits_with_what_stays_beside_it():
  row = priced()
  assert row["hbm_gb"] == 7.6 and row["resident_gb"] == 4.0 and row["fits"]
  assert row["filled_by_gb"]["gradients"] == 1.0
  assert sum(row["filled_by_gb"].values()) == pytest.approx(7.6)
  assert not priced(beside={"other": 1e10})["fits"]


@pytest.mark.parametrize(
  ("level", "changes"),
  [
    ("quick", {}),
    # Fewer cycles than the matmuls need at peak cannot be the whole program.
    ("full", {"cycles": 1e9}),
    ("full", {"unpriced": {"tpu_custom_call": 2.0}}),
  ],
)
def test_seconds_that_the_compiler_does_not_give_are_null(level, changes):
  row = priced(level=level, **changes)
  assert row["seconds"] is None and row["mfu"] is None and row["notes"]
  assert row["collective_gb"] == 135


# --- The command ------------------------------------------------------------


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ("--topology=v5e:3x3", "v5e:2x4"),
    ("--topology=gpu:big", "gpu:80"),
    ("--topology=v5e:2x2 --sequences=none", "--sequences=none"),
    ("--topology=v5e:2x2 --sequence=4", "--sequences"),
    ("--topology=v5e:2x2 --sequences=30", "--sequences=32"),
    ("--topology=v5e:2x2 --masks=3", "use 2"),
    (
      "--topology=v5e:2x2 --sequences=64 --micro_batches=5",
      "--micro_batches=4",
    ),
    ("--topology=v5e:2x2 --config.mesh.fsdp=3", "mesh.fsdp=-1"),
    ("--topology=v5e:2x2 --config.mesh.tensor=2", "mesh.tensor=1"),
    ("--topology=v5e:2x4 --config.mesh.fsp=2", "mesh.fsdp"),
    ("", "--topology"),
  ],
)
def test_what_cannot_be_is_refused_before_anything_is_compiled(
  words, message, monkeypatch, capsys
):
  monkeypatch.setattr(compiler, "topology_devices", forbidden)
  monkeypatch.setattr(compiler, "compile_call", forbidden)
  argv = [f"--config={COUNTDOWN}", *words.split()]
  assert command.main(argv) == cli.MISTAKE
  error = capsys.readouterr().err
  assert message in error and error.startswith("error: ")


@needs_compiler
def test_a_small_run_is_planned_and_its_plan_is_kept(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  argv = [f"--config={COUNTDOWN}", "--topology=v5e:2x2", "--quick", "--json"]
  argv += ["--sequences=32", "--masks=2", "--micro_batches=2"]
  argv += ["--config.model.head_chunks=1"]
  assert command.main(argv) == command.FITS
  first = capsys.readouterr().out
  made = json.loads(first)
  assert made["fits"] and made["micro_batches"] == 2 and made["chips"] == 4
  for name in ("update", "rollout"):
    row = made["programs"][name]
    assert {"flops", "collective_gb", "mfu"} <= row.keys()
    assert 0 < row["hbm_gb"] + row["resident_gb"] < row["capacity_gb"]
    assert row["seconds"] is None  # not without optimisation
  rollout = made["programs"]["rollout"]
  assert rollout["flops"] == rollout["useful_flops"]
  # The same question again is answered from the cache, to the bit.
  monkeypatch.setattr(compiler, "compile_call", forbidden)
  assert command.main(argv) == command.FITS
  assert capsys.readouterr().out == first
  assert "v5e:2x2: fits" in table.render(made)
  # Other memory, other answer: the cache tells the two apart.
  with pytest.raises(AssertionError):
    command.main([*argv, "--config.model.remat=True"])


@pytest.fixture
def estimated(capsys):
  """The estimate for one GPU of a small run, by the words of its command."""

  def plan(arg, *words):
    argv = [f"--config={COUNTDOWN}{arg}", "--topology=gpu:80", "--json"]
    argv += ["--sequences=32", "--prompt=24", "--completion=8", *words]
    assert command.main(argv) == command.FITS
    return json.loads(capsys.readouterr().out)

  return plan


@pytest.mark.parametrize("rank", [0, 4])
def test_what_does_not_fit_says_which_weights_to_halve(rank, capsys):
  argv = [f"--config={COUNTDOWN}", "--topology=gpu:0.001"]
  argv += [f"--config.lora.rank={rank}", "--config.model.param_dtype=float32"]
  assert command.main(argv) == command.DOES_NOT_FIT
  out = capsys.readouterr().out
  assert "GB of weights halve" in out
  assert ("lora.rank=64" in out) == (not rank)


def test_a_rollout_that_waits_for_its_step_is_held_and_scored(estimated):
  before = estimated(":gdpo")
  after = estimated(":gdpo", "--config.rollout.stale_steps=1")
  held = after["resident_by_name_gb"].pop("rollout ahead")
  # Tokens and their mask, order and end of completions, two counts, 3 values.
  expected = 32 * (32 * 5 + 8 * 5 + 3 * 4) + 8
  assert held * chips.GB == pytest.approx(expected)
  assert after["resident_by_name_gb"] == before["resident_by_name_gb"]
  assert "scores" not in before["programs"]
  assert after["programs"]["scores"]["runs"] == 1
  beside = [p["programs"]["update"]["resident_gb"] for p in (before, after)]
  assert beside[1] - beside[0] == pytest.approx(held, rel=1e-3)


def test_a_ratio_under_an_adapter_costs_the_policys_scores_alone(estimated):
  words = ["--config.train.updates_per_rollout=2", "--config.train.passes=one"]
  whole = estimated(":gdpo", *words)["programs"]["scores"]
  words += ["--config.lora.rank=4", "--config.objective.kl_weight=0.1"]
  # The update scores the reference itself, so that the loop asks for the
  # policy's scores only: before the first update, for both of them.
  scores = estimated(":gdpo", *words)["programs"]["scores"]
  assert scores["runs"] == whole["runs"] == 2
  assert scores["useful_flops"] == whole["useful_flops"]
  # A pass through the same weights, and a little for the adapter.
  assert 1 < scores["flops"] / whole["flops"] < 1.5


def test_an_adapter_that_a_run_starts_from_is_planned_as_one(
  estimated, tmp_path
):
  asked = estimated("", "--config.lora.rank=4")
  options = workload.Options(COUNTDOWN, {}, "gpu:80")
  config, _ = workload.configure(options, 1)
  model = programs.model_config(settings.build(config, 1, planning=True))
  found = lora.LoraSettings(4, 8.0, lora.PROJECTIONS)
  start = lora.init(model, found, jax.random.key(0))
  adapters.save_adapter(tmp_path, model, found, start, base="tiny")
  given = estimated(
    "", "--config.lora.rank=0", f"--config.lora.path={tmp_path}"
  )
  held, new = given["resident_by_name_gb"], asked["resident_by_name_gb"]
  assert held["adapter"] == new["adapter"] and held["moments"] == new["moments"]
  # The reference keeps the adapter that the run started from.
  more = held["frozen weights"] - new["frozen weights"]
  assert more == pytest.approx(held["adapter"])


def test_runs_that_differ_in_a_programs_shapes_share_no_answer(monkeypatch):
  monkeypatch.setattr(compiler.importlib.metadata, "version", str)

  def digest(**changes):
    options = workload.Options(COUNTDOWN, {}, "v5e:1x1", **changes)
    config, _ = workload.configure(options, 1)
    built = settings.build(config, 1, planning=True)
    made = types.SimpleNamespace(
      settings=built, model=types.SimpleNamespace(config=None), lora=None
    )
    return compiler.digest(made, chips.parse("v5e:1x1"), "update", "full")

  changes = [{}, {"prompt": 48}, {"completion": 24}, {"masks": 8}]
  assert len({digest(**each) for each in changes}) == len(changes)
  assert digest() == digest()


def test_a_run_on_a_tpu_gives_the_compiler_the_plans_option_and_no_other_does():
  def mesh(platform):
    devices = np.array([[[types.SimpleNamespace(platform=platform)]]])
    return types.SimpleNamespace(devices=devices)

  assert "windowed_einsum" in "".join(compiled.compiler_options(mesh("tpu")))
  assert compiled.compiler_options(mesh("cpu")) == {}
  assert compiled.compiler_options(mesh("gpu")) == {}


def test_bytes_of_a_chip_are_those_of_its_shard():
  mesh = jax.sharding.AbstractMesh((4, 2), ("fsdp", "tensor"))
  where = jax.sharding.NamedSharding(mesh, PartitionSpec("fsdp", None))
  tree = {
    "a": jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=where),
    "b": jax.ShapeDtypeStruct((4, 3), np.float32, sharding=where),
  }
  assert programs.chip_bytes(tree) == 2 * 6 * 2 + 1 * 3 * 4


# --- The real one -----------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("name", ["v5e:2x2", "v5e:4x4"])
@pytest.mark.parametrize("dimension", [0, 1])
def test_a_scattered_sum_stays_one_in_the_compilers_hands(name, dimension):
  devices = compiler.topology_devices(chips.parse(name))
  mesh = sharding.make_mesh(devices=devices)
  rows = PartitionSpec("fsdp", None)

  def gradient(x, cotangent):
    partial = jax.lax.dot_general(x, cotangent, (((0,), (0,)), ((), ())))
    return sharding.sum_scatter(partial, "fsdp", dimension)

  fn = jax.shard_map(
    gradient,
    mesh=mesh,
    in_specs=(rows, rows),
    out_specs=PartitionSpec(
      *(("fsdp", None) if dimension == 0 else (None, "fsdp"))
    ),
    check_vma=False,
  )
  x = jax.ShapeDtypeStruct(
    (512 * mesh.size, 2048),
    jnp.bfloat16,
    sharding=jax.sharding.NamedSharding(mesh, rows),
  )
  traced = jax.jit(fn).trace(x, x)
  compiled = traced.lower(lowering_platforms=("tpu",)).compile()
  wires = hlo.measure(compiled.as_text(), mesh.size).wire_by_kind
  # A ring's count, in bfloat16, whatever the number of stages; the compiler pads.
  by_hand = 2 * 2048**2 * (mesh.size - 1) / mesh.size
  assert wires["reduce-scatter"].bytes == pytest.approx(by_hand, rel=0.05)
  assert "all-reduce" not in wires


@needs_compiler
def test_llada_8b_with_adapters_compiles_and_fits_on_four_v5e_chips():
  counts = dict(sequences=64, masks=2, prompt=256, completion=256)
  options = workload.Options(
    f"{COUNTDOWN}:llada_8b",
    {},
    V5E.name,
    **counts,
    micro_batches=4,
    quick=True,
    no_cache=True,
  )
  made = planner.make_plan(options, V5E, ("update",))
  update = made["programs"]["update"]
  assert made["passes"] == "one" and made["fits"]
  assert update["hbm_gb"] <= 7.6
  assert update["compile_s"] <= 90  # of CPU time
  # Every micro-batch gathers the layers' kernels twice, three quarters of them
  # from other chips; policy and reference share a gather.
  layers = 32 * (4 * 4096**2 + 3 * 4096 * 12288)
  by_hand = 4 * 2 * 2 * layers * 3 / 4 / 1e9
  assert update["collectives"]["all-gather"]["gb"] == pytest.approx(
    by_hand, rel=0.1
  )
  # The adapter's gradients are scattered, not summed on every chip.
  assert update["collectives"].get("all-reduce", {"gb": 0})["gb"] < 0.05
