"""Text to token ids and back, and messages to the prompt a model was tuned on.

A checkpoint folder carries its tokenizer as files. Two layouts are read:

1. `tokenizer.json`, the complete description (LLaDA, and the embedded models).
2. `vocab.json` + `merges.txt`, byte-level BPE of the Qwen2 kind whose added
   tokens stand in `tokenizer_config.json` (Dream's folder has only these).

The ids of the mask, end-of-text and padding tokens are those of `config.json`,
because the network was trained with them; a tokenizer that claims other ids is
refused, since a prompt made with it would mean something else to the model.
The files are data from elsewhere, and some of them are programs: chat templates,
which `chat_templates` renders, and the rules of the `tokenizers` library, which
are tried out in a worker process before they run here (`_try_out`).
"""

import dataclasses
import functools
import json
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from rspo_jax import workers
from rspo_jax.models import hf_folder
from rspo_jax.models.families import CheckpointError

MASK_TOKEN = "<|mdm_mask|>"
END_TOKEN = "<|endoftext|>"

# Copied along by `save`, so that other programs find the folder complete.
TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "chat_template.jinja",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
)

# Names under which released checkpoints store their mask token when
# tokenizer_config.json does not name one (LLaDA's does not).
_MASK_NAMES = (MASK_TOKEN, "<|mask|>", "[MASK]")

# Roles of special tokens; other keys that end in _token are switches.
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

_MAX_ID = 2**31 - 1  # ids are int32 in arrays

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


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A tokenizer with the ids and the chat template of its checkpoint.

  Attributes:
    backend: what turns text into ids.
    mask_id: id of the mask token.
    eos_id: id of the token that ends a completion.
    pad_id: id that fills the left of shorter prompts.
    template: jinja2 source of the chat template, None if the folder has none.
    special_by_role: special tokens by role (`bos_token`, ...), for templates.
    files: the tokenizer's files as read, written back unchanged by `save`.
  """

  backend: tokenizers.Tokenizer
  mask_id: int
  eos_id: int
  pad_id: int
  template: str | None = None
  special_by_role: Mapping[str, str] = dataclasses.field(default_factory=dict)
  files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

  @classmethod
  def load(cls, folder, config: Mapping[str, Any] | None = None):
    """Reads the tokenizer of a checkpoint folder.

    Args:
      folder: local or `gs://` folder.
      config: the folder's config.json where the caller has it already.

    Returns:
      The tokenizer, or None if the folder has none.

    Raises:
      CheckpointError: a damaged file, ids that contradict config.json, or no
        mask, end-of-text or padding token in either; rules that take more
        time or memory than they may.
    """
    from etils import epath

    folder = epath.Path(folder)
    files, left_out = hf_folder.read_companions(folder, TOKENIZER_FILES)
    if not _is_complete(files):
      if _is_complete([*files, *left_out]):
        raise CheckpointError(
          f"{folder}: {left_out} are links that leave the folder, which are "
          "not followed, and there is no tokenizer without them; copy the "
          "files into the folder."
        )
      return None
    if config is None and (folder / "config.json").exists():
      content = hf_folder.read_small(folder / "config.json")
      config = _read_json(f"{folder}/config.json", content)
    _try_out(files, str(folder))
    return cls.from_files(files, config or {}, where=str(folder))

  @classmethod
  def from_files(
    cls, files: Mapping[str, bytes], config: Mapping[str, Any], where: str
  ):
    """Builds a tokenizer from the contents of its files.

    Args:
      files: contents by file name, of the names in `TOKENIZER_FILES`.
      config: the checkpoint's config.json, {} where there is none.
      where: the folder's name, for messages.
    """
    options = _json_of(files, "tokenizer_config.json", where)
    special = _special_tokens(files, options, where)
    backend = _backend(files, options, special, where)
    ids = {
      role: _resolve_id(role, backend, special, config, where)
      for role in ("mask", "eos", "pad")
    }
    return cls(
      backend=backend,
      mask_id=ids["mask"],
      eos_id=ids["eos"],
      pad_id=ids["pad"],
      template=_template(files, options, where),
      special_by_role=special,
      files=dict(files),
    )

  @property
  def vocab_size(self) -> int:
    """One more than the largest id, added tokens included."""
    return max(self.backend.get_vocab().values()) + 1

  def encode(self, text: str) -> list[int]:
    """Turns text into ids; nothing is added in front or behind.

    Raises:
      ValueError: text that the vocabulary cannot spell, with the piece named.
    """
    if not isinstance(text, str):
      raise ValueError(
        f"encode wants a str, got {type(text).__name__}: {text!r:.80}"
      )
    try:
      encode = functools.partial(self.backend.encode, add_special_tokens=False)
      return _guarded(encode, text).ids
    except Exception as error:  # the library raises bare Exceptions
      piece = None if isinstance(error, _Panic) else self._unknown_piece(text)
      if piece is None:
        raise ValueError(
          f"cannot encode {text!r:.80}: {error!s:.300}"
        ) from error
      raise ValueError(
        f"{piece!r} in {text!r:.80} is not in the vocabulary of "
        f"{self.backend.get_vocab_size()} pieces; use only text that the "
        "model's task writes, or a model with a general tokenizer."
      ) from error

  def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
    """Turns ids into text; ids without a token give nothing.

    Args:
      ids: [any length]; the vocabulary may be smaller than the model's head.
      skip_special: leave out mask, end-of-text and the other special tokens.

    Raises:
      ValueError: a number that is no id, or rules that fail on these ids.
    """
    ids = [int(i) for i in ids]
    for i in ids:
      if not 0 <= i <= _MAX_ID:
        raise ValueError(f"decode wants ids from 0 to {_MAX_ID}, got {i}.")
    return _guarded(self.backend.decode, ids, skip_special)

  def chat(
    self,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    **variables,
  ) -> str:
    """Renders messages with the checkpoint's template.

    Args:
      messages: [{"role": "user", "content": "..."}, ...].
      add_generation_prompt: end with the opening of the assistant's turn,
        where the template knows the switch.
      **variables: further variables of the template (`tools`, ...).

    Returns:
      The prompt as text; `encode` turns it into ids.

    Raises:
      ValueError: no template, or the template refuses these messages or
        takes more time or memory than it may.
    """
    if self.template is None:
      raise ValueError(
        "this tokenizer has no chat template: put one into "
        "tokenizer_config.json (chat_template) or chat_template.jinja, or "
        "pass plain text."
      )
    from rspo_jax import chat_templates

    return chat_templates.render(
      self.template,
      messages,
      add_generation_prompt=add_generation_prompt,
      **{**self.special_by_role, **variables},
    )

  def save(self, folder) -> None:
    """Writes the tokenizer's files; `load` reads them back the same."""
    from etils import epath

    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in self.files.items():
      (folder / name).write_bytes(content)

  def _unknown_piece(self, text: str) -> str | None:
    """The first piece of the text that has no id, None if all have one."""
    added = sorted(
      (t.content for t in self.backend.get_added_tokens_decoder().values()),
      key=len,
      reverse=True,
    )
    for token in added:
      text = text.replace(token, "\0")
    for part in text.split("\0"):
      if self.backend.normalizer is not None:
        part = self.backend.normalizer.normalize_str(part)
      pieces = [(part, None)] if part else []
      if self.backend.pre_tokenizer is not None:
        pieces = self.backend.pre_tokenizer.pre_tokenize_str(part)
      for piece, _ in pieces:
        if self.backend.token_to_id(piece) is None:
          return piece
    return None


def build_word_tokenizer(pieces: Sequence[str], pattern: str) -> Tokenizer:
  """Makes a tokenizer over a fixed list of pieces, for the tiny models.

  Ids are the places in `pieces`; the mask token and the end-of-text token
  (padding too) follow. Text decodes to exactly what was encoded.

  Args:
    pieces: the whole vocabulary but the special tokens, no piece twice.
    pattern: regular expression whose matches, and what lies between them, are
      the pieces of a text.

  Raises:
    ValueError: a piece given twice, empty, or cut in two by the pattern.
  """
  pieces = list(pieces)
  for piece in pieces:
    if not isinstance(piece, str) or not piece:
      raise ValueError(f"pieces must be non-empty strings, got {piece!r}.")
  doubled = sorted({p for p in pieces if pieces.count(p) > 1})
  if doubled or {MASK_TOKEN, END_TOKEN} & set(pieces):
    raise ValueError(
      f"pieces must be distinct and leave out {MASK_TOKEN} and {END_TOKEN}; "
      f"given twice or reserved: {doubled or [MASK_TOKEN, END_TOKEN]}."
    )
  vocabulary = {piece: i for i, piece in enumerate(pieces)}
  vocabulary[MASK_TOKEN] = len(pieces)
  vocabulary[END_TOKEN] = len(pieces) + 1
  backend = tokenizers.Tokenizer(models.WordLevel(vocabulary))
  backend.pre_tokenizer = pre_tokenizers.Split(
    tokenizers.Regex(pattern), "isolated"
  )
  backend.decoder = decoders.Fuse()
  backend.add_special_tokens([MASK_TOKEN, END_TOKEN])
  for piece in pieces:
    cut = [p for p, _ in backend.pre_tokenizer.pre_tokenize_str(piece)]
    if cut != [piece]:
      raise ValueError(
        f"the pattern {pattern!r} cuts the piece {piece!r} into {cut}, so it "
        "could never be used; change the pattern or drop the piece."
      )
  options = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "mask_token": MASK_TOKEN,
    "eos_token": END_TOKEN,
    "pad_token": END_TOKEN,
    "clean_up_tokenization_spaces": False,
  }
  files = {
    "tokenizer.json": (backend.to_str(pretty=True) + "\n").encode(),
    "tokenizer_config.json": (json.dumps(options, indent=2) + "\n").encode(),
  }
  return Tokenizer.from_files(files, {}, where="build_word_tokenizer")


def _is_complete(names) -> bool:
  """Whether files make a tokenizer, in either layout."""
  return "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= set(names)


class _Panic(ValueError):
  """The library broke down where it should have raised an error."""


def _guarded(function: Callable, *arguments):
  """Calls the library; what it raises is an Exception, even when it panics."""
  try:
    return function(*arguments)
  except Exception:
    raise
  except BaseException as error:
    # Not an Exception, and its class cannot be imported.
    if type(error).__name__ != "PanicException":
      raise
    raise _Panic(f"the library `tokenizers` gave up: {error!s:.300}") from error


def _try_out(files: Mapping[str, bytes], where: str) -> None:
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
    (outcome,) = _worker().map([[folder]])
  return outcome.reason


@functools.lru_cache(maxsize=1)
def _worker() -> workers.Workers:
  """The process in which tokenizers are tried out."""
  target = f"{__name__}:try_here"
  return workers.Workers(target, count=1, limits=_TRIAL, quiet=True)


def try_here(folder: str) -> None:
  """Builds a tokenizer and puts the samples through it: the worker's part.

  Raises:
    ValueError: the library gave up.
  """
  files = {
    file.name: file.read_bytes() for file in pathlib.Path(folder).iterdir()
  }
  try:
    options = _json_of(files, "tokenizer_config.json", folder)
    special = _special_tokens(files, options, folder)
    backend = _backend(files, options, special, folder)
  except CheckpointError as error:
    if isinstance(error.__cause__, _Panic):
      raise
    return
  calls = [
    functools.partial(backend.encode, text, add_special_tokens=False)
    for text in _SAMPLES
  ]
  calls.append(functools.partial(backend.decode, list(range(256)), False))
  for call in calls:
    try:
      _guarded(call)
    except _Panic:
      raise
    except Exception:  # a text that the vocabulary cannot spell
      continue


def _read_json(where: str, content: bytes) -> dict[str, Any]:
  """Parses a JSON object, or says which file is none."""
  try:
    value = json.loads(content)
  except (ValueError, RecursionError) as error:
    raise CheckpointError(
      f"{where}: not valid JSON ({error!s:.300}); download the file again."
    ) from error
  if not isinstance(value, dict):
    raise CheckpointError(
      f"{where}: a JSON object is expected, got {value!r:.60}."
    )
  return value


def _json_of(files, name: str, where: str) -> dict[str, Any]:
  """A JSON file of the tokenizer, {} where there is none."""
  return _read_json(f"{where}/{name}", files.get(name, b"{}"))


def _wrong(where: str, key: str, value, wanted: str) -> CheckpointError:
  """The error for an entry of another type than it should have."""
  return CheckpointError(
    f"{where}: {key}={value!r:.80} is no {wanted}; correct it, or download the "
    "file again."
  )


def _content(token, where: str, key: str) -> str | None:
  """Text of a token given as such or as an entry with `content`."""
  text = token.get("content") if isinstance(token, dict) else token
  if text is not None and not isinstance(text, str):
    raise _wrong(where, key, token, "text of a token")
  return text


def _special_tokens(files, options, where) -> dict[str, str]:
  """Special tokens by role, from both files that may name them."""
  special = {}
  for name, source in (
    (
      "special_tokens_map.json",
      _json_of(files, "special_tokens_map.json", where),
    ),
    ("tokenizer_config.json", options),
  ):
    for role in _ROLES:
      key = f"{role}_token"
      token = _content(source.get(key), f"{where}/{name}", key)
      if token is not None:
        special[key] = token
  return special


def _special_texts(files, options, special, where) -> set[str]:
  """All texts that are named as special, with a role or without."""
  texts = set(special.values()) | set(_MASK_NAMES)
  token_map = _json_of(files, "special_tokens_map.json", where)
  for name, source in (
    ("special_tokens_map.json", token_map),
    ("tokenizer_config.json", options),
  ):
    for key in ("additional_special_tokens", "extra_special_tokens"):
      tokens = source.get(key) or []
      if isinstance(tokens, dict):
        tokens = list(tokens.values())
      if not isinstance(tokens, list):
        raise _wrong(f"{where}/{name}", key, tokens, "list of tokens")
      texts |= {_content(token, f"{where}/{name}", key) for token in tokens}
  return texts


def _backend(files, options, special, where) -> tokenizers.Tokenizer:
  """The `tokenizers` object of either layout."""
  if "tokenizer.json" not in files:
    backend = _byte_level(files, options, special, where)
  else:
    try:
      text = files["tokenizer.json"].decode()
      backend = _guarded(tokenizers.Tokenizer.from_str, text)
    except Exception as error:  # the library raises bare Exceptions
      raise CheckpointError(
        f"{where}/tokenizer.json is damaged or from a newer version of "
        f"`tokenizers` ({error!s:.300}); download it again or upgrade `tokenizers`."
      ) from error
  # Settings of whoever saved the file last: prompts would lose their ends.
  backend.no_truncation()
  backend.no_padding()
  _check_growth(backend, where)
  return backend


def _byte_level(files, options, special, where) -> tokenizers.Tokenizer:
  """Byte-level BPE of the Qwen2 kind from vocab.json and merges.txt."""
  vocabulary = _json_of(files, "vocab.json", where)
  try:
    lines = files["merges.txt"].decode().split("\n")
    merges = [
      tuple(line.split(" "))
      for line in lines
      if line and not line.startswith("#version")
    ]
    model = _guarded(models.BPE, vocabulary, merges)
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
  for token, added in _added_tokens(files, options, special, where):
    add = backend.add_special_tokens if added.special else backend.add_tokens
    _guarded(add, [added])
    if backend.token_to_id(added.content) != token:
      raise CheckpointError(
        f"{where}: the added token {added.content!r:.80} should have id {token}"
        f" but gets {backend.token_to_id(added.content)}; vocab.json and "
        "tokenizer_config.json are of different checkpoints."
      )
  return backend


def _added_tokens(files, options, special, where):
  """(id, token) of the added tokens in the order of their ids.

  As in transformers, an added token is special where its entry says so or a
  role names it; added_tokens.json, the older file, has no entries.
  """
  named = _special_texts(files, options, special, where)
  added = {}
  file = f"{where}/added_tokens.json"
  for content, token in _json_of(files, "added_tokens.json", where).items():
    if type(token) is not int or not 0 <= token <= _MAX_ID:
      raise _wrong(file, content, token, "id")
    added[token] = {"content": content}
  file = f"{where}/tokenizer_config.json"
  entries = options.get("added_tokens_decoder") or {}
  if not isinstance(entries, dict):
    raise _wrong(file, "added_tokens_decoder", entries, "object of tokens")
  for key, entry in entries.items():
    if not (key.isascii() and key.isdigit() and int(key[:12]) <= _MAX_ID):
      raise _wrong(file, "added_tokens_decoder", key, "id")
    if isinstance(entry, str):
      entry = {"content": entry, "special": True}
    text = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(text, str) or not text:
      raise _wrong(file, f"added_tokens_decoder.{key}", entry, "token")
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
    raise _wrong(where, name, value, "true or false")
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


def _resolve_id(role, backend, special, config, where) -> int:
  """The id of a role: config.json's, checked against the tokenizer's."""
  claimed = special.get(f"{role}_token")
  if claimed is None and role == "mask":
    claimed = next(
      (n for n in _MASK_NAMES if backend.token_to_id(n) is not None), None
    )
  own = None if claimed is None else backend.token_to_id(claimed)
  if claimed is not None and own is None:
    raise CheckpointError(
      f"{where}: tokenizer_config.json names {role}_token {claimed!r:.80}, "
      "which is not in the vocabulary; the files are of different checkpoints."
    )
  key = f"{role}_token_id"
  wanted = config.get(key)
  if isinstance(wanted, list):  # generation configs may list several ends
    wanted = own if own in wanted else (wanted[0] if wanted else None)
  if wanted is not None and (
    type(wanted) is not int or not 0 <= wanted <= _MAX_ID
  ):
    raise _wrong(f"{where}/config.json", key, config[key], "id")
  if wanted is None and own is None:
    raise CheckpointError(
      f"{where}: neither config.json ({key}) nor the tokenizer "
      f"({role}_token) says which token is the {role} token; add "
      f"{key} to config.json."
    )
  if wanted is None:
    return own
  if own is not None and own != wanted:
    raise CheckpointError(
      f"{where}: config.json says {key}={wanted} but the "
      f"tokenizer's {role}_token {claimed!r} has id {own}; correct whichever "
      "is wrong, the model only knows one of them."
    )
  return wanted


def _template(files, options, where) -> str | None:
  """The chat template's source, chat_template.jinja before the config's."""
  if "chat_template.jinja" in files:
    try:
      return files["chat_template.jinja"].decode()
    except UnicodeDecodeError as error:
      raise CheckpointError(
        f"{where}/chat_template.jinja is no UTF-8 text ({error!s:.300}); download it "
        "again."
      ) from error
  file = f"{where}/tokenizer_config.json"
  template = options.get("chat_template")
  if isinstance(template, list):
    by_name = {}
    for entry in template:
      if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise _wrong(file, "chat_template", entry, "template with a name")
      by_name[entry["name"]] = entry.get("template")
    if by_name and "default" not in by_name:
      raise CheckpointError(
        f"{file}: chat_template names {sorted(by_name)} and none of them "
        "'default', so nothing says which is meant; name one of them so."
      )
    template = by_name.get("default")
  if template is not None and not isinstance(template, str):
    raise _wrong(file, "chat_template", template, "text")
  return template
