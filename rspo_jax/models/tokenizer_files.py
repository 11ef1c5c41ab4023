"""What a tokenizer's files say: tokens, vocabulary and rules, each checked.

Files come from elsewhere, and the rules of the `tokenizers` library are
programs: normalizers and decoders that make texts longer, expressions that go
back and forth. So rules that could grow a text beyond all bounds are refused,
and a tokenizer is tried out in a worker process before it runs here.
"""

import functools
import json
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from rspo_jax.devices import workers
from rspo_jax.models import families, model_folder
from rspo_jax.models.families import CheckpointError

# Names under which released checkpoints store their mask token when
# tokenizer_config.json does not name one (LLaDA's does not).
MASK_NAMES = (
  *(family.mask_token for family in families.FAMILIES.values()),
  "[MASK]",
)

# Roles of special tokens; other keys that end in _token are switches.
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

MAX_ID = 2**31 - 1  # ids are int32 in arrays

# How often longer the rules of a tokenizer may make a text: real ones stay
# below 100, and a handful of replacements that double it would fill memory.
_MAX_GROWTH = 2**12

# Loading the largest vocabularies takes a second; a busy machine gets its time.
_TRIAL = workers.Limits(time_s=60.0, memory_bytes=4 << 30)

# What prompts look like, and runs on which expressions go back and forth.
_SAMPLES = (
  "The answer to 25+56-11=92 is:\n\n <answer>\\boxed{3/4}</answer>\t\u2581",
  "Gr\u00f6\u00dfe \u6570\u5b66 \u0e01\u0e33 e\u0301 \U0001f600 \ufb01",
  *(f"{character * 500}!" for character in "a1 -=\n\u4e00"),
)

# How Qwen2's tokenizer cuts text before byte-level BPE.
_QWEN2_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Panic(ValueError):
  """The library broke down where it should have raised an error."""


def guarded(function: Callable, *arguments):
  """Calls the library; what it raises is an Exception, even when it panics."""
  try:
    return function(*arguments)
  except Exception:
    raise
  except BaseException as error:
    # Not an Exception, and its class cannot be imported.
    if type(error).__name__ != "PanicException":
      raise
    raise Panic(f"the library `tokenizers` gave up: {error!s:.300}") from error


def try_out(files: Mapping[str, bytes], where: str) -> None:
  """Builds and uses a tokenizer in a worker, with limits of time and memory.

  Normalizers, expressions and padding rules are programs. One that explodes
  ends the worker and not the run; errors of other kinds are told where the
  tokenizer is built in this process.

  Raises:
    CheckpointError: the worker did not come back.
  """
  reason = _trial(tuple(sorted(files.items())))
  if reason:
    raise CheckpointError(
      f"{where}: {' or '.join(sorted(files))} cannot be used: on ordinary text "
      f"the tokenizer fails ({reason}). Download the files again, or take "
      "those of the original checkpoint."
    )


@functools.lru_cache(maxsize=8)
def _trial(files: tuple[tuple[str, bytes], ...]) -> str:
  """Why a worker failed over these files, empty when it did not."""
  with tempfile.TemporaryDirectory() as folder:
    for name, content in files:
      (pathlib.Path(folder) / name).write_bytes(content)
    pool = workers.pool(f"{__name__}:try_here", 1, _TRIAL, quiet=True)
    (outcome,) = pool.map([[folder]])
  return outcome.reason


def try_here(folder: str) -> None:
  """Builds a tokenizer and puts the samples through it: the worker's part.

  Raises:
    ValueError: the library gave up.
  """
  files = {
    file.name: file.read_bytes() for file in pathlib.Path(folder).iterdir()
  }
  try:
    backend, *_ = read(files, folder)
  except CheckpointError as error:
    if isinstance(error.__cause__, Panic):
      raise
    return
  calls = [
    functools.partial(backend.encode, text, add_special_tokens=False)
    for text in _SAMPLES
  ]
  calls.append(functools.partial(backend.decode, list(range(256)), False))
  for call in calls:
    try:
      guarded(call)
    except Panic:
      raise
    except Exception:  # a text that the vocabulary cannot spell
      continue


def _json_of(files, name: str, where: str) -> dict[str, Any]:
  """A JSON file of the tokenizer, {} where there is none."""
  return model_folder.parse_json(files.get(name, b"{}"), f"{where}/{name}")


def wrong(where: str, key: str, value, wanted: str) -> CheckpointError:
  """The error for an entry of another type than it should have."""
  return CheckpointError(
    f"{where}: {key}={value!r:.80} is no {wanted}; correct it, or download the "
    "file again."
  )


def _content(token, where: str, key: str) -> str | None:
  """Text of a token given as such or as an entry with `content`."""
  text = token.get("content") if isinstance(token, dict) else token
  if text is not None and not isinstance(text, str):
    raise wrong(where, key, token, "text of a token")
  return text


def read(
  files: Mapping[str, bytes], where: str
) -> tuple[tokenizers.Tokenizer, dict[str, Any], dict[str, str]]:
  """What makes texts of ids, tokenizer_config.json, special tokens by role.

  Args:
    files: contents by name.
    where: the folder's name, for messages.

  Raises:
    CheckpointError: naming file and entry.
  """
  options = _json_of(files, "tokenizer_config.json", where)
  sources = {
    f"{where}/special_tokens_map.json": _json_of(
      files, "special_tokens_map.json", where
    ),
    f"{where}/tokenizer_config.json": options,
  }
  special = {}
  for file, source in sources.items():
    for role in _ROLES:
      key = f"{role}_token"
      token = _content(source.get(key), file, key)
      if token is not None:
        special[key] = token
  if "tokenizer.json" in files:
    backend = _from_json(files["tokenizer.json"], where)
  else:
    named = _named(sources) | set(special.values()) | set(MASK_NAMES)
    backend = _byte_level(files, options, named, where)
  # Settings of whoever saved the file last: prompts would lose their ends.
  backend.no_truncation()
  backend.no_padding()
  _check_growth(backend, where)
  return backend, options, special


def _named(sources) -> set[str]:
  """Texts that are named as special without a role."""
  texts = set()
  for file, source in sources.items():
    for key in ("additional_special_tokens", "extra_special_tokens"):
      tokens = source.get(key) or []
      if isinstance(tokens, dict):
        tokens = list(tokens.values())
      if not isinstance(tokens, list):
        raise wrong(file, key, tokens, "list of tokens")
      texts |= {_content(token, file, key) for token in tokens}
  return texts


def _from_json(content: bytes, where: str) -> tokenizers.Tokenizer:
  """The tokenizer that tokenizer.json describes."""
  try:
    return guarded(tokenizers.Tokenizer.from_str, content.decode())
  except Exception as error:  # the library raises bare Exceptions
    raise CheckpointError(
      f"{where}/tokenizer.json is damaged or from a newer version of "
      f"`tokenizers` ({error!s:.300}); download it again or upgrade `tokenizers`."
    ) from error


def _byte_level(files, options, named, where) -> tokenizers.Tokenizer:
  """Byte-level BPE of the Qwen2 kind from vocab.json and merges.txt."""
  vocabulary = _json_of(files, "vocab.json", where)
  try:
    lines = files["merges.txt"].decode().split("\n")
    merges = [
      tuple(line.split(" "))
      for line in lines
      if line and not line.startswith("#version")
    ]
    model = guarded(models.BPE, vocabulary, merges)
  except Exception as error:  # the library raises bare Exceptions
    raise CheckpointError(
      f"{where}: vocab.json and merges.txt do not fit together ({error!s:.300}); "
      "download both again."
    ) from error
  backend = tokenizers.Tokenizer(model)
  backend.normalizer = normalizers.NFC()
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_QWEN2_SPLIT), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  backend.decoder = decoders.ByteLevel()
  for token, added in _added_tokens(files, options, named, where):
    add = backend.add_special_tokens if added.special else backend.add_tokens
    guarded(add, [added])
    if backend.token_to_id(added.content) != token:
      raise CheckpointError(
        f"{where}: the added token {added.content!r:.80} should have id {token}"
        f" but gets {backend.token_to_id(added.content)}; vocab.json and "
        "tokenizer_config.json are of different checkpoints."
      )
  return backend


def _added_tokens(files, options, named, where):
  """(id, token) of the added tokens in the order of their ids.

  As in transformers, an added token is special where its entry says so or a
  role names it; added_tokens.json, the older file, has no entries.
  """
  added = {}
  file = f"{where}/added_tokens.json"
  for content, token in _json_of(files, "added_tokens.json", where).items():
    if type(token) is not int or not 0 <= token <= MAX_ID:
      raise wrong(file, content, token, "id")
    added[token] = {"content": content}
  file = f"{where}/tokenizer_config.json"
  entries = options.get("added_tokens_decoder") or {}
  if not isinstance(entries, dict):
    raise wrong(file, "added_tokens_decoder", entries, "object of tokens")
  for key, entry in entries.items():
    if not (key.isascii() and key.isdigit() and int(key[:12]) <= MAX_ID):
      raise wrong(file, "added_tokens_decoder", key, "id")
    if isinstance(entry, str):
      entry = {"content": entry, "special": True}
    text = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(text, str) or not text:
      raise wrong(file, f"added_tokens_decoder.{key}", entry, "token")
    added[int(key)] = entry
  result = []
  for token in sorted(added):
    entry = added[token]
    text = entry["content"]
    marked = {
      name: _switch(entry, name, f"{file}: added_tokens_decoder.{token}")
      for name in ("special", "lstrip", "rstrip", "single_word", "normalized")
    }
    marked["special"] |= text in named
    result.append((token, tokenizers.AddedToken(text, **marked)))
  return result


def _switch(entry, name: str, where: str) -> bool:
  """True or false of an entry, false where it says nothing."""
  value = entry.get(name, False)
  if type(value) is not bool:
    raise wrong(where, name, value, "true or false")
  return value


def _check_growth(backend: tokenizers.Tokenizer, where: str) -> None:
  """Refuses rules that could make a text many times longer.

  What they cost depends on the text, so that no trial can find it.
  """
  for part in ("normalizer", "pre_tokenizer", "decoder"):
    rule = getattr(backend, part)
    if rule is None:
      continue
    growth = _growth(json.loads(rule.__getstate__()))
    if growth > _MAX_GROWTH:
      raise CheckpointError(
        f"{where}: the {part} of the tokenizer could make a text {growth:.3g} "
        f"times longer, more than the {_MAX_GROWTH} that any real one needs; "
        "take the tokenizer of the original checkpoint."
      )


def _growth(rule: Mapping[str, Any]) -> float:
  """How many times longer a rule can make a text, in bytes, at most."""
  kind = rule["type"]
  if kind == "Sequence":
    growth = 1.0
    for key in ("normalizers", "pretokenizers", "decoders"):
      for part in rule.get(key, ()):
        growth = min(growth * _growth(part), 1e300)
    return growth
  if kind == "Replace":
    found = len(rule["pattern"].get("String", "").encode())
    put = len(rule["content"].encode())
    return max(1.0, put / found) if found else 1.0 + put
  if kind == "Prepend":
    return 1.0 + len(rule["prepend"].encode())
  # Letters taken apart, bytes written as letters, spaces around characters.
  return 2.0 if kind in ("ByteLevel", "NFKD", "NFKC", "NFD") else 1.0
