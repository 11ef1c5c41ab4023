"""Text comes back from its ids; ids and templates are the checkpoint's."""

import json
import time

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from rspo_jax import chat_templates, workers
from rspo_jax.tokenizer import Tokenizer, build_word_tokenizer

PIECES = [*"0123456789+-*/()= \n", "<answer>", "</answer>", "12"]
PATTERN = r"</?answer>|12|[\s\S]"


@pytest.fixture(scope="module")
def words():
  """A tiny model's tokenizer."""
  return build_word_tokenizer(PIECES, PATTERN)


@given(st.lists(st.sampled_from(PIECES), max_size=30))
@settings(deadline=None, max_examples=50)
def test_decoding_returns_exactly_what_was_encoded(pieces):
  words = build_word_tokenizer(PIECES, PATTERN)
  text = "".join(pieces)
  ids = words.encode(text)
  assert words.decode(ids) == text
  assert all(0 <= i < len(PIECES) for i in ids)


def test_ids_are_the_places_in_the_list_and_specials_follow(words):
  assert words.encode("012</answer>") == [0, PIECES.index("12"), 20]
  assert words.encode("1") == [1]
  assert words.mask_id == len(PIECES)
  assert words.eos_id == words.pad_id == len(PIECES) + 1
  assert words.vocab_size == len(PIECES) + 2
  assert words.encode("1<|endoftext|>2") == [1, words.eos_id, 2]


def test_special_tokens_are_left_out_unless_asked_for(words):
  ids = np.array([1, words.mask_id, 2, words.eos_id], np.int32)
  assert words.decode(ids) == "12"
  assert words.decode(ids, skip_special=False) == "1<|mdm_mask|>2<|endoftext|>"


def test_ids_past_the_vocabulary_decode_to_nothing(words):
  assert words.decode([1, 5000, 2]) == "12"


@pytest.mark.parametrize("number", [-1, 2**31, 10**30])
def test_a_number_that_is_no_id_is_told(words, number):
  with pytest.raises(ValueError, match=f"ids from 0 to .*got {number}"):
    words.decode([1, number])


def test_truncation_and_padding_stored_in_a_file_do_not_act(words, tmp_path):
  words.save(tmp_path)
  backend = tokenizers.Tokenizer.from_str(
    words.files["tokenizer.json"].decode()
  )
  backend.enable_truncation(4)
  backend.enable_padding(length=40, pad_token="=")
  backend.save(str(tmp_path / "tokenizer.json"))
  assert Tokenizer.load(tmp_path).encode("(1+2)*3") == words.encode("(1+2)*3")


def test_text_that_the_vocabulary_cannot_spell_names_the_piece(words):
  with pytest.raises(ValueError, match=r"'x' in '1\+x<answer>'"):
    words.encode("1+x<answer>")
  with pytest.raises(ValueError, match="wants a str, got int"):
    words.encode(3)


def test_a_saved_tokenizer_loads_as_the_same(words, tmp_path):
  words.save(tmp_path)
  again = Tokenizer.load(tmp_path)
  assert again.encode("(1+2)*3") == words.encode("(1+2)*3")
  assert (again.mask_id, again.eos_id, again.pad_id) == (22, 23, 23)
  again.save(tmp_path / "copy")
  for file in words.files:
    copy = (tmp_path / "copy" / file).read_bytes()
    assert copy == (tmp_path / file).read_bytes()


@pytest.mark.parametrize(
  ("pieces", "pattern", "message"),
  [
    (["a", "b", "a"], ".", r"given twice or reserved: \['a'\]"),
    (["a", ""], ".", "non-empty"),
    (["<|endoftext|>"], ".", "reserved"),
    (["ab"], ".", r"cuts the piece 'ab' into \['a', 'b'\]"),
  ],
)
def test_pieces_that_could_not_work_are_refused(pieces, pattern, message):
  with pytest.raises(ValueError, match=message):
    build_word_tokenizer(pieces, pattern)


# --- Ids ---------------------------------------------------------------------


def write_config(folder, **ids):
  (folder / "config.json").write_text(json.dumps(ids))


def test_a_folder_without_tokenizer_gives_none(tmp_path):
  write_config(tmp_path, mask_token_id=3)
  assert Tokenizer.load(tmp_path) is None


def test_ids_of_config_and_tokenizer_must_agree(words, tmp_path):
  words.save(tmp_path)
  write_config(tmp_path, mask_token_id=22, eos_token_id=23, pad_token_id=23)
  assert Tokenizer.load(tmp_path).mask_id == 22
  write_config(tmp_path, mask_token_id=5, eos_token_id=23, pad_token_id=23)
  with pytest.raises(ValueError, match=r"mask_token_id=5 .*mdm_mask.* id 22"):
    Tokenizer.load(tmp_path)


def strip_names(folder):
  """Takes the roles out of tokenizer_config.json, as LLaDA's does its mask."""
  file = folder / "tokenizer_config.json"
  file.write_text("{}")


def test_ids_that_the_tokenizer_does_not_name_come_from_the_config(
  words, tmp_path
):
  words.save(tmp_path)
  strip_names(tmp_path)
  write_config(tmp_path, eos_token_id=4, pad_token_id=6)
  loaded = Tokenizer.load(tmp_path)
  # The mask token is known by its name, as LLaDA's tokenizer has it.
  assert (loaded.mask_id, loaded.eos_id, loaded.pad_id) == (22, 4, 6)


def test_an_id_that_nobody_names_is_an_error(words, tmp_path):
  words.save(tmp_path)
  strip_names(tmp_path)
  write_config(tmp_path, mask_token_id=22)
  with pytest.raises(ValueError, match=r"add eos_token_id to config\.json"):
    Tokenizer.load(tmp_path)


def test_a_tokenizer_without_mask_token_is_an_error(tmp_path):
  backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1}))
  backend.save(str(tmp_path / "tokenizer.json"))
  options = {"eos_token": "</s>", "pad_token": {"content": "</s>"}}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
  with pytest.raises(ValueError, match="mask token; add mask_token_id"):
    Tokenizer.load(tmp_path)


def test_a_named_token_outside_the_vocabulary_is_an_error(words, tmp_path):
  words.save(tmp_path)
  options = {"mask_token": "<|other|>"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
  with pytest.raises(ValueError, match=r"<\|other\|>.*not in the vocabulary"):
    Tokenizer.load(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_is_told_as_such(words, tmp_path, file):
  words.save(tmp_path)
  (tmp_path / file).write_bytes(b'{"version": \xff')
  with pytest.raises(ValueError, match="download"):
    Tokenizer.load(tmp_path)


# --- Byte-level BPE without tokenizer.json -----------------------------------


def test_vocabulary_and_merges_give_the_same_ids_as_tokenizer_json(tmp_path):
  """Dream's folder has no tokenizer.json; the pieces must agree with one."""
  split = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
  )
  whole = tokenizers.Tokenizer(models.BPE())
  whole.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(split), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  whole.decoder = decoders.ByteLevel()
  corpus = ["the number of the numbers is 42,\n\tisn't it? Größe 数"] * 4
  trainer = trainers.BpeTrainer(
    vocab_size=300,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  whole.train_from_iterator(corpus, trainer)
  whole.model.save(str(tmp_path))
  first = whole.get_vocab_size()
  options = {
    "added_tokens_decoder": {
      str(first): {"content": "<|endoftext|>", "special": True},
      str(first + 1): {"content": "<tool>", "special": False},
      str(first + 2): {"content": "<|mask|>", "special": True},
    },
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "mask_token": "<|mask|>",
  }
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
  loaded = Tokenizer.load(tmp_path)
  assert (loaded.mask_id, loaded.eos_id) == (first + 2, first)
  text = "the  42nd number's Größe\n\n isn't 数!"
  assert loaded.encode(text) == whole.encode(text).ids
  assert loaded.decode(loaded.encode(text)) == text
  assert len(loaded.encode("4242")) == 4  # digits stand alone
  with_added = loaded.encode("is<tool><|mask|>it")
  places = [with_added.index(first + 1), with_added.index(first + 2)]
  assert places[1] == places[0] + 1
  assert loaded.decode(with_added) == "is<tool>it"
  options["added_tokens_decoder"][str(first + 7)] = {"content": "<hole>"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
  with pytest.raises(ValueError, match="different checkpoints"):
    Tokenizer.load(tmp_path)


def byte_level(folder, added, options):
  """A folder in the older layout, with added_tokens.json."""
  vocabulary = {c: i for i, c in enumerate(sorted(set("<answer>/5")))}
  ids = {text: len(vocabulary) + i for i, text in enumerate(added)}
  for name, content in (
    ("vocab.json", vocabulary),
    ("added_tokens.json", ids),
    ("tokenizer_config.json", options),
  ):
    (folder / name).write_text(json.dumps(content))
  (folder / "merges.txt").write_text("#version: 0.2\n")
  return Tokenizer.load(folder)


def test_only_named_tokens_of_added_tokens_json_are_special(tmp_path):
  """As transformers reads the file: it says nothing about special tokens."""
  added = ["<answer>", "</answer>", "[M]", "[E]", "[A]", "[B]", "[C]"]
  options = {
    "mask_token": "[M]",
    "eos_token": {"content": "[E]"},
    "pad_token": "[E]",
    "additional_special_tokens": ["[A]"],
    "extra_special_tokens": {"boi": "[B]"},
  }
  loaded = byte_level(tmp_path, added, options)
  ids = loaded.encode("<answer>[A]5[B][M][C]</answer>[E]")
  assert len(ids) == 8
  assert loaded.decode(ids) == "<answer>5[C]</answer>"
  # Entries of the newer kind say it themselves, or a role does.
  first = loaded.backend.token_to_id("<answer>")
  options["added_tokens_decoder"] = {
    str(first + i): {"content": text, "lstrip": text == "[C]"}
    for i, text in enumerate(added)
  }
  options["added_tokens_decoder"][str(first)]["special"] = True
  loaded = byte_level(tmp_path, added, options)
  ids = loaded.encode("<answer>5[M]</answer>")
  assert loaded.decode(ids) == "5</answer>"


# --- Chat templates ----------------------------------------------------------


def with_template(words, folder, options):
  """The tiny tokenizer with another tokenizer_config.json."""
  words.save(folder)
  file = folder / "tokenizer_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | options))
  return Tokenizer.load(folder)


def hub_options(shared, name):
  """Template and role tokens of a released tokenizer."""
  folder = shared / "fixtures" / "hub_metadata"
  text = (folder / f"{name}_tokenizer_special.json").read_text()
  options = json.loads(text)
  return {k: options[k] for k in ("chat_template", "bos_token")}


def test_llada_template_renders_its_turns(shared, words, tmp_path):
  options = hub_options(shared, "llada_8b_instruct")
  options["bos_token"] = "="  # a token that the tiny vocabulary has
  loaded = with_template(words, tmp_path, options)
  messages = [
    {"role": "user", "content": " What is 1+2?\n"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "Sure?"},
  ]
  head = "<|start_header_id|>{}<|end_header_id|>\n\n"
  assert loaded.chat(messages) == (
    "=" + head.format("user") + "What is 1+2?<|eot_id|>"
    + head.format("assistant") + "3<|eot_id|>"
    + head.format("user") + "Sure?<|eot_id|>"
    + head.format("assistant")
  )  # fmt: skip


def test_dream_template_renders_its_turns(shared, words, tmp_path):
  options = hub_options(shared, "dream_v0_instruct_7b") | {"bos_token": "="}
  loaded = with_template(words, tmp_path, options)
  messages = [{"role": "user", "content": "hi"}]
  system = "<|im_start|>system\n{}<|im_end|>\n"
  assert loaded.chat(messages) == (
    system.format("You are a helpful assistant.")
    + "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
  )
  told = [{"role": "system", "content": "Count."}, *messages]
  assert loaded.chat(told, add_generation_prompt=False) == (
    system.format("Count.") + "<|im_start|>user\nhi<|im_end|>\n"
  )
  tools = [{"name": "f", "about": "a < b & 'ü'"}]
  # Tools are shown as JSON, not as escaped HTML.
  assert '{"name": "f", "about": "a < b & \'ü\'"}' in loaded.chat(
    messages, tools=tools
  )


def test_a_template_file_goes_before_the_config(words, tmp_path):
  words.save(tmp_path)
  (tmp_path / "chat_template.jinja").write_text(
    "{% for m in messages %}\n  {% if m.role == 'user' %}\n"
    "{{ m.content }}{{ eos_token }}\n  {% endif %}\n{% endfor %}\n"
  )
  loaded = Tokenizer.load(tmp_path)
  # Lines that hold only a statement leave nothing behind.
  assert loaded.chat([{"role": "user", "content": "a"}]) == "a<|endoftext|>\n"
  loaded.save(tmp_path / "copy")
  assert (tmp_path / "copy" / "chat_template.jinja").exists()


def test_the_default_of_several_templates_is_used(words, tmp_path):
  entries = [
    {"name": "tool_use", "template": "no"},
    {"name": "default", "template": "{{ messages[0].content }}"},
  ]
  loaded = with_template(words, tmp_path, {"chat_template": entries})
  assert loaded.chat([{"role": "user", "content": "yes"}]) == "yes"


@pytest.mark.parametrize(
  "template",
  [
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ raise_exception('roles must alternate') }}",
    "{{ nothing.at.all }}",
    "{% for %}",
    "{{ 1 / 0 }}",
  ],
)
def test_templates_can_neither_reach_out_nor_crash(words, tmp_path, template):
  loaded = with_template(words, tmp_path, {"chat_template": template})
  messages = [{"role": "user", "content": "a"}]
  with pytest.raises(ValueError, match="template refused"):
    loaded.chat(messages)
  assert messages == [{"role": "user", "content": "a"}]


TURN = [{"role": "user", "content": "U"}]


@pytest.mark.parametrize(
  ("template", "expected"),
  [
    # What transformers 5 renders; see apply_chat_template there.
    ("{% if tools is not none %}TOOLS{% endif %}U", "U"),
    ("{% if documents is not none %}DOCUMENTS{% endif %}U", "U"),
    ("{{ add_generation_prompt }}", "True"),
    ("{{ bos_token is defined }}{{ eos_token }}", "False<|endoftext|>"),
    ("{{ date_string is defined }}", "False"),
    ("{% generation %}U{% endgeneration %}", "U"),
    (
      "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}"
      "{% endgeneration %}{{ x }}",
      "21",
    ),
    (
      "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}"
      "{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
      "02",
    ),
    (
      "{{ {'b': 'ü<', 'a': [1]} | tojson(indent=1, sort_keys=true,"
      " separators=(',', ':')) }}",
      '{\n "a":[\n  1\n ],\n "b":"ü<"\n}',
    ),
    ("{{ 'ü' | tojson(ensure_ascii=true) }}", '"\\u00fc"'),
    ("{{ strftime_now('%%') }}", "%"),
  ],
)
def test_a_template_sees_what_transformers_gives_it(
  words, tmp_path, template, expected
):
  loaded = with_template(words, tmp_path, {"chat_template": template})
  assert loaded.chat(TURN) == expected


@pytest.mark.parametrize(
  "template",
  [
    "{{ 'x' * 10**10 }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ 'x'.ljust(10**10) }}",
    "{{ lipsum(n=10**9) }}",
    "{% set n = namespace(s='x') %}{% for i in range(60) %}"
    "{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "{% set n = namespace(s=[]) %}{% for i in range(60) %}"
    "{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{{ 10 ** (10**10) }}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(1) }}",
    "{{ 'x' * 2000000 }}",
  ],
)
def test_no_template_takes_more_time_or_memory_than_it_may(
  words, tmp_path, monkeypatch, template
):
  limits = workers.Limits(time_s=1.0, memory_bytes=256 << 20)
  monkeypatch.setattr(chat_templates, "LIMITS", limits)
  chat_templates._worker.cache_clear()
  loaded = with_template(words, tmp_path, {"chat_template": template})
  begin = time.monotonic()
  with pytest.raises(ValueError, match="template refused"):
    loaded.chat(TURN)
  assert time.monotonic() - begin < 10.0
  chat_templates._worker.cache_clear()


def test_chat_without_template_says_where_one_belongs(words):
  with pytest.raises(ValueError, match="chat_template"):
    words.chat([{"role": "user", "content": "a"}])
