"""Text to token ids and back, and messages to the prompt a model was tuned on.

A checkpoint folder carries its tokenizer as files. Two layouts are read:

1. `tokenizer.json`, the complete description (LLaDA, and the embedded models).
2. `vocab.json` + `merges.txt`, byte-level BPE of the Qwen2 kind whose added
   tokens stand in `tokenizer_config.json` (Dream's folder has only these).

The ids of the mask, end-of-text and padding tokens are those of `config.json`,
because the network was trained with them; a tokenizer that claims other ids is
refused, since a prompt made with it would mean something else to the model.
Chat templates are programs that come with the weights, so they are rendered in
jinja2's immutable sandbox.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

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
      ValueError: a damaged file, ids that contradict config.json, or no mask,
        end-of-text or padding token in either.
    """
    from etils import epath

    folder = epath.Path(folder)
    files = {
      name: (folder / name).read_bytes()
      for name in TOKENIZER_FILES
      if (folder / name).exists()
    }
    if "tokenizer.json" not in files and not (
      "vocab.json" in files and "merges.txt" in files
    ):
      return None
    if config is None and (folder / "config.json").exists():
      config = _read_json("config.json", (folder / "config.json").read_bytes())
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
    options = _read_json(where, files.get("tokenizer_config.json", b"{}"))
    special = _special_tokens(
      options, _read_json(where, files.get("special_tokens_map.json", b"{}"))
    )
    backend = _backend(files, options, where)
    ids = {
      role: _resolve_id(role, backend, special, config, where)
      for role in ("mask", "eos", "pad")
    }
    return cls(
      backend=backend,
      mask_id=ids["mask"],
      eos_id=ids["eos"],
      pad_id=ids["pad"],
      template=_template(files, options),
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
      return self.backend.encode(text, add_special_tokens=False).ids
    except Exception as error:
      piece = self._unknown_piece(text)
      if piece is None:
        raise ValueError(f"cannot encode {text!r:.80}: {error}") from error
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
    """
    return self.backend.decode(
      [int(i) for i in ids], skip_special_tokens=skip_special
    )

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
      ValueError: no template, or the template refuses these messages.
    """
    if self.template is None:
      raise ValueError(
        "this tokenizer has no chat template: put one into "
        "tokenizer_config.json (chat_template) or chat_template.jinja, or "
        "pass plain text."
      )
    import jinja2

    try:
      return _compiled_template(self.template).render(
        messages=list(messages),
        add_generation_prompt=add_generation_prompt,
        **{**self.special_by_role, **variables},
      )
    except (jinja2.TemplateError, TypeError, ArithmeticError) as error:
      raise ValueError(
        f"the chat template refused the messages: {error}"
      ) from error

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


def _read_json(where: str, content: bytes) -> dict[str, Any]:
  """Parses a JSON object, or says which file is none."""
  try:
    value = json.loads(content)
  except (UnicodeDecodeError, json.JSONDecodeError) as error:
    raise ValueError(
      f"{where}: not valid JSON ({error}); download the file again."
    ) from error
  if not isinstance(value, dict):
    raise ValueError(f"{where}: a JSON object is expected, got {value!r:.60}.")
  return value


def _special_tokens(options, token_map) -> dict[str, str]:
  """Special tokens by role, from both files that may name them."""
  special = {}
  for source in (token_map, options):
    for role, token in source.items():
      if not role.endswith("_token"):
        continue
      if isinstance(token, dict):
        token = token.get("content")
      if isinstance(token, str):
        special[role] = token
  return special


def _backend(files, options, where) -> tokenizers.Tokenizer:
  """The `tokenizers` object of either layout."""
  if "tokenizer.json" in files:
    try:
      return tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    except Exception as error:  # the library raises bare Exceptions
      raise ValueError(
        f"{where}/tokenizer.json is damaged or from a newer version of "
        f"`tokenizers` ({error}); download it again or upgrade `tokenizers`."
      ) from error
  vocabulary = _read_json(f"{where}/vocab.json", files["vocab.json"])
  lines = files["merges.txt"].decode().split("\n")
  merges = [
    tuple(line.split(" "))
    for line in lines
    if line and not line.startswith("#version")
  ]
  try:
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
  except Exception as error:  # the library raises bare Exceptions
    raise ValueError(
      f"{where}: vocab.json and merges.txt do not fit together ({error}); "
      "download both again."
    ) from error
  backend.normalizer = normalizers.NFC()
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_QWEN2_SPLIT), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  backend.decoder = decoders.ByteLevel()
  for token, content, special in _added_tokens(files, options, where):
    added = tokenizers.AddedToken(content, special=special, normalized=False)
    (backend.add_special_tokens if special else backend.add_tokens)([added])
    if backend.token_to_id(content) != token:
      raise ValueError(
        f"{where}: the added token {content!r} should have id {token} but "
        f"gets {backend.token_to_id(content)}; vocab.json and "
        "tokenizer_config.json are of different checkpoints."
      )
  return backend


def _added_tokens(files, options, where) -> list[tuple[int, str, bool]]:
  """(id, text, special) of the added tokens in the order of their ids."""
  added = {}
  extra = _read_json(where, files.get("added_tokens.json", b"{}"))
  for content, token in extra.items():
    added[int(token)] = (content, True)
  for token, entry in options.get("added_tokens_decoder", {}).items():
    if isinstance(entry, str):
      entry = {"content": entry, "special": True}
    added[int(token)] = (entry["content"], bool(entry.get("special", True)))
  return [(token, *added[token]) for token in sorted(added)]


def _resolve_id(role, backend, special, config, where) -> int:
  """The id of a role: config.json's, checked against the tokenizer's."""
  claimed = special.get(f"{role}_token")
  if claimed is None and role == "mask":
    claimed = next(
      (n for n in _MASK_NAMES if backend.token_to_id(n) is not None), None
    )
  own = None if claimed is None else backend.token_to_id(claimed)
  if claimed is not None and own is None:
    raise ValueError(
      f"{where}: tokenizer_config.json names {role}_token {claimed!r}, which "
      "is not in the vocabulary; the files are of different checkpoints."
    )
  wanted = config.get(f"{role}_token_id")
  if isinstance(wanted, list):  # generation configs may list several ends
    wanted = own if own in wanted else (wanted[0] if wanted else None)
  if wanted is None and own is None:
    raise ValueError(
      f"{where}: neither config.json ({role}_token_id) nor the tokenizer "
      f"({role}_token) says which token is the {role} token; add "
      f"{role}_token_id to config.json."
    )
  if wanted is None:
    return own
  if own is not None and own != wanted:
    raise ValueError(
      f"{where}: config.json says {role}_token_id={wanted} but the "
      f"tokenizer's {role}_token {claimed!r} has id {own}; correct whichever "
      "is wrong, the model only knows one of them."
    )
  return int(wanted)


def _template(files, options) -> str | None:
  """The chat template's source, chat_template.jinja before the config's."""
  if "chat_template.jinja" in files:
    return files["chat_template.jinja"].decode()
  template = options.get("chat_template")
  if isinstance(template, list):
    by_name = {entry["name"]: entry["template"] for entry in template}
    template = by_name.get("default")
  return template


@functools.lru_cache(maxsize=16)
def _compiled_template(source: str):
  """Compiles a template in the sandbox, with the usual helpers."""
  import jinja2
  import jinja2.ext
  import jinja2.sandbox

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[jinja2.ext.loopcontrols],
  )

  def refuse(message):
    raise jinja2.TemplateError(message)

  def to_json(value, indent=None):
    # jinja2's own filter escapes for HTML, which the models never saw.
    return json.dumps(value, ensure_ascii=False, indent=indent)

  environment.globals["raise_exception"] = refuse
  environment.filters["tojson"] = to_json
  return environment.from_string(source)
