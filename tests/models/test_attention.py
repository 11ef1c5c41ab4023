"""Attention without scores: every kernel says what the einsum says."""

import functools
import importlib.util
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from rspo_jax.devices import sharding
from rspo_jax.models import attention
from rspo_jax.models.attention import Visibility, by_kv_head
from rspo_jax.planning import compiler, flops
from rspo_jax.planning.chips import parse
from rspo_jax.run import loading

HEADS, KV_HEADS, DIM = 4, 2, 24


def inputs(length, sequences=2):
  """q, k, v, a cotangent and which keys are read: pads on the left, and holes.

  Sequences are padded by nothing, a third and two thirds of the length, in
  turn; the second has a hole.
  """
  rng = np.random.default_rng(length)

  def draw(heads):
    values = rng.standard_normal((sequences, length, heads, DIM))
    return jnp.asarray(values, jnp.float32)

  pads = np.arange(sequences)[:, None] % 3 * (length // 3)
  read = np.arange(length) >= pads
  read[1, length // 2] = False
  q, out = draw(HEADS), draw(HEADS)
  return q, draw(KV_HEADS), draw(KV_HEADS), out, jnp.asarray(read)


def biased_einsum(q, k, v, read):
  parts = [(by_kv_head(k), by_kv_head(v), Visibility(read))]
  return attention.attend(q, parts, KV_HEADS)


@pytest.mark.parametrize("half", ["text", "noisy"])
def test_parts_are_one_softmax_and_blocks_see_what_their_half_may(half):
  # One part, or a noisy copy beside the clean text; the last block is short.
  q, k, v, _, read = inputs(5)
  block = np.arange(5) // 2
  own = Visibility(read, block, block, half)
  parts = [(by_kv_head(k), by_kv_head(v), own)]
  if half == "noisy":
    clean = Visibility(None, block, block, "clean")
    parts.insert(0, (by_kv_head(k[:, ::-1]), by_kv_head(v[:, ::-1]), clean))
  ours = attention.attend(q, parts, KV_HEADS)
  k, v, read = (np.asarray(x) for x in (k, v, read))
  for n, i, head in np.ndindex(2, 5, HEADS):
    shared, b = head // (HEADS // KV_HEADS), i // 2
    blocks = {"text": range(b + 1), "noisy": [b]}[half]
    seen = [(k, v, j) for j in range(5) if j // 2 in blocks and read[n, j]]
    if half == "noisy":
      seen += [(k[:, ::-1], v[:, ::-1], j) for j in range(2 * b)]
    if not seen:
      continue
    keys = np.array([x[n, j, shared] for x, _, j in seen], np.float64)
    values = np.array([x[n, j, shared] for _, x, j in seen], np.float64)
    weights = np.exp(keys @ np.asarray(q[n, i, head]) / DIM**0.5)
    wanted = weights / weights.sum() @ values
    np.testing.assert_allclose(ours[n, i, head], wanted, atol=2e-5)


def outputs_and_gradients(kernel, q, k, v, cotangent, read):
  def run(q, k, v, cotangent, read):
    out, back = jax.vjp(lambda q, k, v: kernel(q, k, v, read), q, k, v)
    return out, *back(cotangent)

  return jax.jit(run)(q, k, v, cotangent, read)


def assert_same(kernel, *arguments):
  ours = outputs_and_gradients(kernel, *arguments)
  wanted = outputs_and_gradients(biased_einsum, *arguments)
  for a, b in zip(ours, wanted, strict=True):
    assert a.shape == b.shape and a.dtype == b.dtype
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_splash_is_the_einsum_for_every_row_pads_included():
  kernel = functools.partial(attention.splash, interpret=True)
  # Padded to 640, 5 x 5 blocks.
  assert_same(kernel, *inputs(600))


def test_reading_a_length_of_sorted_keys_is_the_einsum():
  # What cuDNN is asked, asked of XLA.
  kernel = functools.partial(attention.cudnn, implementation="xla")
  assert_same(kernel, *inputs(12))


def test_without_a_mesh_or_on_a_cpu_it_is_the_einsum():
  def kernel(q, k, v, read):
    both = (
      attention.flash(q, k, v, Visibility(read), mesh)
      for mesh in (None, sharding.make_mesh())
    )
    return sum(both) / 2

  assert_same(kernel, *inputs(12))


def devices_agree():
  """Runs where there are eight devices."""
  kernel = functools.partial(attention.cudnn, implementation="xla")
  with tiny_runs.quick():
    # Two kv heads on four places, and on two.
    for shape in ((1, 2, 4), (2, 2, 2)):
      mesh = sharding.make_mesh(*shape)
      on_mesh = functools.partial(attention.on_mesh, kernel, mesh)
      assert_same(on_mesh, *inputs(12, 4))


def test_on_eight_devices_each_query_head_meets_its_own_kv_head():
  here = pathlib.Path(__file__)
  env = {
    **os.environ,
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "PYTHONPATH": os.pathsep.join(
      str(folder) for folder in (here.parents[2], here.parents[1], here.parent)
    ),
  }
  code = "import test_attention; test_attention.devices_agree()"
  done = subprocess.run(
    [sys.executable, "-c", code], env=env, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-2000:]


def device(platform, capability=None):
  return types.SimpleNamespace(platform=platform, compute_capability=capability)


@pytest.mark.parametrize(
  "dtype, dim, where, kernel",
  (
    ("bfloat16", 128, device("tpu"), attention.splash),
    ("float32", 128, device("tpu"), attention.splash),
    ("bfloat16", 64, device("gpu", "8.0"), attention.cudnn),
    ("bfloat16", 128, device("gpu", "10.0"), attention.cudnn),
    ("float32", 64, device("gpu", "9.0"), None),
    ("bfloat16", 60, device("gpu", "9.0"), None),
    ("bfloat16", 256, device("gpu", "9.0"), None),
    ("bfloat16", 64, device("gpu", "7.5"), None),
    ("bfloat16", 64, device("gpu", "gfx90a"), None),
    ("bfloat16", 64, device("cpu"), None),
  ),
)
def test_the_device_says_which_kernel_runs(dtype, dim, where, kernel):
  q = jax.ShapeDtypeStruct((1, 8, 2, dim), dtype)
  assert attention._kernel(q, where) is kernel


def mesh_of(where):
  return types.SimpleNamespace(devices=np.array([where], object))


def test_heads_that_no_tpu_kernel_takes_are_refused_with_the_remedy():
  attention.check(256, mesh_of(device("tpu")))
  attention.check(96, mesh_of(device("gpu", "9.0")))
  with pytest.raises(ValueError, match=r"128 on TPU.* 96 wide.*=einsum"):
    attention.check(96, mesh_of(device("tpu")))


def test_a_run_with_flash_on_a_tpu_is_refused_before_it_is_compiled():
  greedy = types.SimpleNamespace(completion_length=8)
  evaluation = types.SimpleNamespace(greedy=greedy)
  settings = types.SimpleNamespace(
    model=types.SimpleNamespace(compute_dtype="auto", attention="flash"),
    data=types.SimpleNamespace(prompt_length=8),
    sampler=types.SimpleNamespace(completion_length=8),
    evaluations=(evaluation,),
  )
  config = types.SimpleNamespace(max_length=16, head_dim=64)
  with pytest.raises(ValueError, match=r"model\.attention=flash"):
    loading.model_config(settings, config, mesh_of(device("tpu")))


def test_a_kernel_counts_the_flops_of_its_whole_grid():
  shape = jax.ShapeDtypeStruct
  q, k = (shape((2, 640, heads, DIM), "float32") for heads in (4, 2))
  traced = jax.jit(attention.splash).trace(q, k, k, shape((2, 640), bool))
  # Scores and their product with the values, 2 FLOPs a multiply-add.
  assert flops.executed(traced.jaxpr) == 2 * 2 * (2 * 4 * 640 * 640 * DIM)


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="the TPU compiler is not installed: pip install libtpu",
)
def test_the_tpu_compiler_takes_it_and_holds_no_scores():
  mesh = sharding.make_mesh(
    1, 2, 2, compiler.topology_devices(parse("v5e:2x2"))
  )
  where = jax.sharding.NamedSharding(
    mesh,
    sharding.spec(mesh, (16, 1024, 32, 128), ("batch", None, "heads", None)),
  )
  q, k = (
    jax.ShapeDtypeStruct((16, 1024, heads, 128), "bfloat16", sharding=where)
    for heads in (32, 8)
  )
  seen = jax.ShapeDtypeStruct((16, 1024), bool)

  def gradient(kind):
    def total(q, k, v, seen):
      if kind == "flash":
        out = attention.flash(q, k, v, Visibility(seen), mesh)
      else:
        parts = [(by_kv_head(k), by_kv_head(v), Visibility(seen))]
        out = attention.attend(q, parts, 8)
      return jnp.square(out.astype(jnp.float32)).sum()

    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(q, k, k, seen)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  # Of one chip: 8 sequences, 16 heads, float32. Fewer fit beside the cores.
  scores = 8 * 16 * 1024**2 * 4
  assert gradient("flash") < scores < gradient("einsum")
