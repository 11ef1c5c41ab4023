"""Meshes, and rows on their way to the devices and back."""

import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from rspo_jax import sharding


@pytest.mark.parametrize(
  ("asked", "devices", "shape"),
  [
    ((1, -1, 1), 1, (1, 1, 1)),
    ((1, -1, 1), 8, (1, 8, 1)),
    ((-1, 1, 1), 8, (8, 1, 1)),
    ((2, -1, 2), 8, (2, 2, 2)),
    ((2, 2, 2), 8, (2, 2, 2)),
    ((1, 4, -1), 8, (1, 4, 2)),
    ((1, 8, -1), 8, (1, 8, 1)),
  ],
)
def test_the_rest_of_the_devices_go_to_the_axis_of_minus_one(
  asked, devices, shape
):
  assert sharding.mesh_shape(*asked, devices) == shape


@pytest.mark.parametrize(
  ("asked", "devices", "said"),
  [
    ((1, 3, 1), 8, "8 devices"),
    ((3, -1, 1), 8, "mesh.data=3"),
    ((1, 16, 1), 8, "mesh.fsdp=16"),
    ((-1, -1, 1), 8, "only one axis"),
    ((1, 0, 1), 8, "positive"),
    ((1, -2, 1), 8, "positive"),
  ],
)
def test_axes_that_do_not_make_the_devices_are_refused(asked, devices, said):
  with pytest.raises(ValueError, match=said):
    sharding.mesh_shape(*asked, devices)


@pytest.mark.parametrize("devices", [1, 2, 6, 8, 12])
def test_the_mesh_that_an_error_names_works(devices):
  for tensor in (1, 2, 3, 4, 5, 8):
    try:
      sharding.mesh_shape(1, 5, tensor, devices)
    except ValueError as error:
      words = str(error).partition("use ")[2].rstrip(".").split()
      sizes = [int(word.partition("=")[2]) for word in words]
      assert np.prod(sharding.mesh_shape(*sizes, devices)) == devices


def test_rows_come_back_from_the_devices():
  mesh = sharding.make_mesh()
  rows = {"a": np.arange(6).reshape(3, 2), "b": np.array([True, False, True])}
  there = sharding.put_global(mesh, rows)
  assert there["a"].sharding == sharding.batch_sharding(mesh)
  for name, value in rows.items():
    np.testing.assert_array_equal(sharding.local_rows(there[name]), value)
  assert sharding.batch_shards(mesh) == jax.device_count()


@given(st.data())
def test_every_row_is_judged_by_one_process_each(data):
  processes = data.draw(st.sampled_from([1, 2, 3, 4]))
  devices = processes * data.draw(st.sampled_from([1, 2, 3]))
  ways = [n for n in range(1, devices + 1) if devices % n == 0]
  tensor = data.draw(st.sampled_from(ways))
  order = np.arange(devices) % processes
  if data.draw(st.booleans()):
    order = np.sort(order)
  holders = tuple(
    tuple(sorted(set(each))) for each in order.reshape(-1, tensor).tolist()
  )
  rows = data.draw(st.integers(1, 5))
  size = rows * len(holders)
  judged = []
  for process in range(processes):
    split = sharding.Split(size, holders, process)
    # What it holds are the rows of its shards.
    assert split.held.tolist() == [
      row for row in range(size) if process in holders[row // rows]
    ]
    assert split.held[split.own].tolist() == split.own_of(process).tolist()
    judged.extend(split.own_of(process).tolist())
    if len(holders) % processes == 0 and (np.diff(order) >= 0).all():
      share = size // processes
      assert split.held.tolist() == list(
        range(process * share, (process + 1) * share)
      )
  assert sorted(judged) == list(range(size))


def test_processes_of_a_mesh_share_the_shards_that_tensor_splits():
  process = lambda i: types.SimpleNamespace(process_index=i)  # noqa: E731
  for shape, owners, holders in (
    ((1, 2, 1), [0, 1], ((0,), (1,))),
    ((1, 1, 2), [0, 1], ((0, 1),)),
    ((2, 1, 2), [0, 0, 1, 1], ((0,), (1,))),
    ((1, 2, 2), [0, 1, 0, 1], ((0, 1), (0, 1))),
    ((1, 4, 1), [0, 1, 0, 1], ((0,), (1,), (0,), (1,))),
  ):
    mesh = types.SimpleNamespace(
      devices=np.array([process(i) for i in owners]).reshape(shape),
      shape=dict(zip(sharding.AXES, shape, strict=True)),
    )
    assert sharding.split(mesh, 8).holders == holders


def test_one_process_gathers_its_own_rows():
  rows = [{"index": 1}, {"index": 0}]
  assert sharding.gather_json(rows) == rows
  np.testing.assert_array_equal(
    sharding.gather_rows(np.arange(3)), np.arange(3)
  )


def test_logical_names_become_axes_that_divide_the_shape():
  mesh = AbstractMesh((2, 4, 2), sharding.AXES)

  def boxed(shape, *names):
    return nn.LogicallyPartitioned(
      jax.ShapeDtypeStruct(shape, "float32"), names
    )

  tree = {
    "kernel": boxed((3, 8, 6), "layers", "embed", "heads"),
    "odd": boxed((3, 6, 7), "layers", "embed", "heads"),
    "norm": boxed((3, 8), "layers", "norm"),
    "vocabulary": boxed((10, 8), "vocab", "embed"),
  }
  found = sharding.shardings(mesh, tree)
  spec = PartitionSpec
  expected = {
    "kernel": spec(None, "fsdp", "tensor"),
    "odd": spec(None, None, None),  # 6 % 4 and 7 % 2
    "norm": spec(None, None),
    "vocabulary": spec("tensor", "fsdp"),
  }
  for name, value in expected.items():
    shape = tree[name].value.shape
    same = NamedSharding(mesh, value).is_equivalent_to(found[name], len(shape))
    assert same, (name, found[name])


def test_every_logical_name_of_the_model_has_a_rule():
  from rspo_jax.models import families, transformer

  config = families.ModelConfig(
    family="llada",
    vocab_size=16,
    width=8,
    layers=2,
    heads=2,
    kv_heads=1,
    mlp_width=16,
    rope_theta=1e4,
    norm_eps=1e-5,
    mask_id=0,
    eos_id=1,
    pad_id=1,
    max_length=8,
    qk_norm=True,
    qkv_bias=True,
    linear_bias=True,
    norm_bias=True,
  )
  boxed = jax.eval_shape(
    lambda key: transformer.init(config, key, boxed=True), jax.random.key(0)
  )
  specs = jax.tree.leaves(
    nn.get_partition_spec(boxed), is_leaf=lambda x: isinstance(x, PartitionSpec)
  )
  used = {name for spec in specs for name in spec if name is not None}
  assert used <= {name for name, _ in sharding.RULES}
  assert {"embed", "heads", "mlp", "vocab"} <= used


# Sampling with a layout of its own.

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Samples with parameters where training has them and laid out anew.
LAYOUTS = """
import json, re, sys
import jax, numpy as np, tiny_runs
from rspo_jax import main, program, settings, sharding, train_step
rng = np.random.default_rng(0)
prompts = rng.integers(0, 4, (8, 16)).astype(np.int32), np.ones((8, 16), bool)
out = []
with tiny_runs.quick():
  for argv in json.loads(sys.argv[1]):
    built = program.build(settings.build(main.parse(argv)[0], 8))
    state = program.fresh_state(built)
    trained = state.params
    if built.lora is not None:
      # Adapters start at zero: nothing would be seen of them.
      moves = np.random.default_rng(1)
      trained = jax.tree.map(
        lambda x: x + 0.3 * moves.standard_normal(x.shape, np.float32), trained
      )
    params = built.for_sampling(built.policy(trained))
    arguments = (
      params,
      *sharding.put_global(built.mesh, prompts),
      train_step.stream_key(0, 0, train_step.ROLLOUT),
    )
    compiled = built.rollout_fn.lower(*arguments).compile()
    completions = built.rollout_fn(*arguments)
    gathered = re.findall(
      r"= ([a-z0-9]+\\[[0-9,]*\\])\\S* all-gather", compiled.as_text()
    )
    kernels = jax.tree.leaves(params)
    out.append({
      "tokens": np.asarray(completions.tokens).tolist(),
      "gathered": gathered,
      "kernels": [list(x.shape) for x in kernels],
      "parts": [list(x.addressable_shards[0].data.shape) for x in kernels],
    })
print("said", json.dumps(out))
"""


def sampled(*argvs):
  """What LAYOUTS says of commands on 8 virtual devices, and its warnings."""
  done = subprocess.run(
    [sys.executable, "-c", LAYOUTS, json.dumps(argvs)],
    cwd=ROOT,
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
      "PYTHONPATH": str(ROOT / "tests"),
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  (line,) = [x for x in done.stdout.splitlines() if x.startswith("said ")]
  return json.loads(line.removeprefix("said ")), done.stderr


@pytest.mark.parametrize(
  "rank", [pytest.param(0, marks=pytest.mark.slow), 4], ids=["all", "adapter"]
)
def test_parameters_laid_out_for_sampling_give_the_same_completions(rank, tiny):
  options = {"lora__rank": rank, "eval__every": 0}
  (where_trained, laid_out), warnings = sampled(
    tiny("unused", cache="", **options),
    tiny("unused", cache="", mesh__rollout_tensor=2, **options),
  )
  # All but a row or two, in which a near-tie falls the other way.
  pairs = zip(where_trained["tokens"], laid_out["tokens"], strict=True)
  assert sum(one == other for one, other in pairs) >= 30
  # Two halves of each split weight, instead of eight parts of it: nothing of
  # two dimensions after the layers is gathered while sampling.
  halves = [
    part
    for whole, part in zip(laid_out["kernels"], laid_out["parts"], strict=True)
    if part != whole
  ]
  assert halves
  for whole, part in zip(laid_out["kernels"], laid_out["parts"], strict=True):
    assert np.prod(whole) in (np.prod(part), 2 * np.prod(part))
  one_layer = {
    "f32[" + ",".join(map(str, [1, *whole[1:]])) + "]"
    for whole in laid_out["kernels"]
    if len(whole) == 3
  }
  assert one_layer & set(where_trained["gathered"])
  assert not one_layer & set(laid_out["gathered"])
  # On the way no weight was whole on every device.
  assert "rematerialization" not in warnings


_SUMS = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec
from rspo_jax import sharding

for devices in (8, 16, 32):
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  x = np.random.default_rng(0).standard_normal((devices, 64, 3, 32))
  x = x.astype(np.float32)
  for dimension in (0, 2):
    shard = [None] * 3
    shard[dimension] = "fsdp"
    found = jax.jit(jax.shard_map(
      lambda x: sharding.sum_scatter(x[0], "fsdp", dimension),
      mesh=mesh,
      in_specs=PartitionSpec("fsdp"),
      out_specs=PartitionSpec(*shard),
      check_vma=False,
    ))(x)
    np.testing.assert_allclose(found, x.sum(0), rtol=1e-5, atol=1e-5)
    print("agrees")
"""


def test_a_sum_that_is_scattered_is_the_sum_on_any_number_of_devices():
  root = pathlib.Path(__file__).resolve().parent.parent
  done = subprocess.run(
    [sys.executable, "-c", _SUMS],
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_force_host_platform_device_count=32",
      "PYTHONPATH": str(root),
    },
    capture_output=True,
    text=True,
    timeout=500,
  )
  assert done.stdout.count("agrees") == 6, done.stderr[-2000:]
