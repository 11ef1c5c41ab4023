"""Text to token ids and back, and messages to the prompt a model was tuned on.

A checkpoint folder carries its tokenizer as files. Two layouts are read:

1. `tokenizer.json`, the complete description (LLaDA, and the embedded models).
2. `vocab.json` + `merges.txt`, byte-level BPE of the Qwen2 kind whose added
   tokens stand in `tokenizer_config.json` (Dream's folder has only these).

The ids of the mask, end-of-text and padding tokens are those of `config.json`,
because the network was trained with them; a tokenizer that claims other ids is
refused, since a prompt made with it would mean something else to the model.
The files are data from elsewhere; `tokenizer_files` checks what they say, and
`chat_templates` renders their templates.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from rspo_jax.models import families, model_folder, tokenizer_files
from rspo_jax.models.families import CheckpointError
from rspo_jax.models.tokenizer_files import MAX_ID, Panic, guarded, wrong

MASK_TOKEN = families.FAMILIES["llada"].mask_token
END_TOKEN = "<|endoftext|>"

# Copied along by `save`, so that other programs find the folder complete.
TOKENIZER_FILES = (
  "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
  "chat_template.jinja", "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip


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
    files, left_out = model_folder.read_companions(folder, TOKENIZER_FILES)
    if not _is_complete(files):
      if _is_complete([*files, *left_out]):
        raise CheckpointError(
          f"{folder}: {left_out} are links that leave the folder, which are "
          "not followed, and there is no tokenizer without them; copy the "
          "files into the folder."
        )
      return None
    if config is None and (folder / "config.json").exists():
      content = model_folder.read_small(folder / "config.json")
      config = model_folder.parse_json(content, f"{folder}/config.json")
    tokenizer_files.try_out(files, str(folder))
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
    backend, options, special = tokenizer_files.read(files, where)
    ids = {
      f"{role}_id": _resolve_id(role, backend, special, config, where)
      for role in ("mask", "eos", "pad")
    }
    return cls(
      backend=backend,
      **ids,
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
      return guarded(encode, text).ids
    except Exception as error:  # the library raises bare Exceptions
      piece = None if isinstance(error, Panic) else self._unknown_piece(text)
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
      if not 0 <= i <= MAX_ID:
        raise ValueError(f"decode wants ids from 0 to {MAX_ID}, got {i}.")
    return guarded(self.backend.decode, ids, skip_special)

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
    from rspo_jax.models import chat_templates

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


def _resolve_id(role, backend, special, config, where) -> int:
  """The id of a role: config.json's, checked against the tokenizer's."""
  claimed = special.get(f"{role}_token")
  if claimed is None and role == "mask":
    claimed = next(
      (
        n
        for n in tokenizer_files.MASK_NAMES
        if backend.token_to_id(n) is not None
      ),
      None,
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
    type(wanted) is not int or not 0 <= wanted <= MAX_ID
  ):
    raise wrong(f"{where}/config.json", key, config[key], "id")
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
        raise wrong(file, "chat_template", entry, "template with a name")
      by_name[entry["name"]] = entry.get("template")
    if by_name and "default" not in by_name:
      raise CheckpointError(
        f"{file}: chat_template names {sorted(by_name)} and none of them "
        "'default', so nothing says which is meant; name one of them so."
      )
    template = by_name.get("default")
  if template is not None and not isinstance(template, str):
    raise wrong(file, "chat_template", template, "text")
  return template
