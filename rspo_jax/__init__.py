"""Reinforcement learning of masked-diffusion language models in JAX.

    import rspo_jax
    model = rspo_jax.load_model("path/to/LLaDA-8B-Instruct")
    out = rspo_jax.generate(model, prompts, gen_length=128, steps=128,
                            block_length=32)

The names below are loaded on first use, so that importing the package (and a
command's `--help`) does not wait for JAX. The commands live in `tools/` and are
called without it: `python -m rspo_jax.demo`.
"""

import importlib
import pathlib

__path__.append(str(pathlib.Path(__file__).parent / "tools"))

__version__ = "0.1.0"

_API = ("generate", "load_model", "logits", "save_model", "verify")

__all__ = ["__version__", "generate", "load_model", "logits", "save_model", "verify"]  # fmt: skip


def __getattr__(name: str):
  if name in _API:
    return getattr(importlib.import_module("rspo_jax.api"), name)
  raise AttributeError(f"module 'rspo_jax' has no attribute {name!r}")


def __dir__():
  return sorted([*globals(), *_API])
