"""Tokenizers: of a checkpoint's folder, and one by characters for tiny models without any."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from ais_jax.errors import UserError

VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# Turns end with these in the families that have them, whichever single id a config names.
_END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>")
# Reasoning is part of a completion's text, even where a vocabulary calls its marks special.
_SHOWN_TOKENS = ("<think>", "</think>")


class Tokenizer(Protocol):
    """Between text and ids, as prompts and rewards need it."""

    @property
    def size(self) -> int:
        """Largest id + 1. A model may have more logits: those must never be sampled."""

    @property
    def pad_id(self) -> int:
        """Fills rows; may be one of `eos_ids`."""

    @property
    def eos_id(self) -> int:
        """What a demonstration is ended with."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All ids that end a completion, `eos_id` first."""

    @property
    def has_chat_template(self) -> bool:
        """Whether it is a `TextTokenizer` that can `chat`."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. None are added; special tokens written in it become their id."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text up to the first end id, special tokens left out."""


@dataclasses.dataclass(frozen=True)
class CharTokenizer:
    """One token a character: id 0 pads, id 1 ends a completion, then the alphabet in order."""

    alphabet: str
    pad_id: ClassVar[int] = 0
    eos_id: ClassVar[int] = 1
    has_chat_template: ClassVar[bool] = False

    @property
    def size(self) -> int:
        """Number of ids, specials included."""
        return len(self.alphabet) + 2

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a completion."""
        return (self.eos_id,)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without specials.

        Raises:
          UserError: a character is not in the alphabet.
        """
        ids = {char: i + 2 for i, char in enumerate(self.alphabet)}
        unknown = sorted(set(text) - set(ids))
        if unknown:
            raise UserError(
                f"the character tokenizer does not know {unknown[0]!r} in {text[:40]!r}; "
                f"its alphabet is {self.alphabet!r}"
            )
        return [ids[char] for char in text]

    def decode(self, ids: Iterable[int]) -> str:
        """Text up to the first end token; padding is skipped."""
        chars = []
        for i in ids:
            if i == self.eos_id:
                break
            if i != self.pad_id:
                chars.append(self.alphabet[i - 2])
        return "".join(chars)


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
    """A checkpoint's own tokenizer; `load_tokenizer` makes it.

    Attributes:
      backend: a transformers tokenizer.
      size: largest id + 1.
      pad_id: fills rows.
      eos_ids: all ids that end a completion; the first ends a demonstration.
      hidden_ids: special tokens, which `decode` leaves out.
    """

    backend: Any
    size: int
    pad_id: int
    eos_ids: tuple[int, ...]
    hidden_ids: frozenset[int]

    @property
    def eos_id(self) -> int:
        """What a demonstration is ended with."""
        return self.eos_ids[0]

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` works."""
        return bool(self.backend.chat_template)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. None are added; special tokens written in it become their id.

        Raises:
          UserError: the vocabulary cannot spell the text.
        """
        try:
            return self.backend.encode(
                text, add_special_tokens=False, split_special_tokens=False, verbose=False
            )
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise UserError(
                f"the tokenizer of {self.backend.name_or_path} cannot encode {text[:40]!r}: "
                f"{first_line(error)}"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Text up to the first end id. Special tokens are left out, the marks of reasoning stay."""
        kept = []
        for i in map(int, ids):
            if i in self.eos_ids:
                break
            if i not in self.hidden_ids:
                kept.append(i)
        return self.backend.decode(kept, clean_up_tokenization_spaces=False)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        enable_thinking: bool | None = None,
        reply: str = "",
    ) -> list[int]:
        """Ids of a conversation as `render` writes it, and of how the reply begins.

        Raises like `render`.
        """
        return self.encode(self.render(messages, enable_thinking) + reply)

    def render(
        self, messages: Sequence[Mapping[str, str]], enable_thinking: bool | None = None
    ) -> str:
        """A conversation by the checkpoint's chat template, up to where the reply starts.

        Args:
          messages: each with "role" and "content".
          enable_thinking: passed to the template; None passes nothing, which templates may take
            for either.

        Raises:
          UserError: there is no template, or it refuses the messages.
        """
        if not self.has_chat_template:
            raise UserError(
                f"the tokenizer of {self.backend.name_or_path} has no chat template; put its "
                "chat_template.jinja into that folder, or prompt without a chat template"
            )
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        try:
            text = self.backend.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, **thinking
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise UserError(
                f"the chat template of {self.backend.name_or_path} refuses the messages with roles "
                f"{[message.get('role') for message in messages]}: {first_line(error)}"
            ) from None
        return text


def tokenizer_files(directory: str | os.PathLike) -> list[pathlib.Path]:
    """The files of a folder that make up its tokenizer: a saved checkpoint needs them all."""
    paths = (pathlib.Path(directory) / name for name in TOKENIZER_FILES)
    return [path for path in paths if path.is_file()]


def load_tokenizer(directory: str | os.PathLike) -> TextTokenizer:
    """The tokenizer of a local checkpoint folder. Runs no code from the folder.

    A completion ends with the tokenizer's own end token, with those that generation_config.json
    and config.json name, and with <|im_end|>, <|endoftext|> and <|eot_id|> where they exist.

    Raises:
      UserError: files are missing or broken, or nothing names an end token.
    """
    directory = pathlib.Path(directory)
    if not any((directory / name).is_file() for name in VOCABULARY_FILES):
        raise UserError(
            f"{directory} holds no tokenizer ({', '.join(VOCABULARY_FILES)}); "
            "copy the tokenizer files of the checkpoint there"
        )
    try:
        backend = _load_backend(directory)
        vocabulary = backend.get_vocab()
    except Exception as error:  # parsers of several libraries, each with errors of its own
        raise UserError(
            f"the tokenizer in {directory} cannot be read: {first_line(error)}; "
            "copy the tokenizer files of the checkpoint there again"
        ) from None
    added = backend.added_tokens_decoder
    configs = _configs(directory)
    named = [i for c in configs for i in _token_ids(c, "eos_token_id", directory)]
    named += sorted(i for i, token in added.items() if token.content in _END_TOKENS)
    own = backend.eos_token_id
    if own is None and not named:
        raise UserError(
            f"nothing in {directory} names an end token; set eos_token in tokenizer_config.json"
        )
    eos_id = named[0] if own is None else own
    pads = [i for c in configs for i in _token_ids(c, "pad_token_id", directory)]
    return TextTokenizer(
        backend=backend,
        size=max(vocabulary.values()) + 1,
        pad_id=next(i for i in (backend.pad_token_id, *pads, eos_id) if i is not None),
        eos_ids=(eos_id, *sorted(set(named) - {eos_id})),
        hidden_ids=frozenset(
            i for i, t in added.items() if t.special and t.content not in _SHOWN_TOKENS
        ),
    )


def save_char_tokenizer(tokenizer: CharTokenizer, directory: str | os.PathLike) -> None:
    """Writes tokenizer.json and tokenizer_config.json that give the same ids and text."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    # Text holds no special token that its alphabet cannot spell.
    marks = (char for char in map(chr, (*b"|", *range(0x21, 0x10FFFF))))
    mark = next(char for char in marks if char not in tokenizer.alphabet)
    pad, eos = f"<{mark}pad{mark}>", f"<{mark}end{mark}>"
    vocabulary = {pad: tokenizer.pad_id, eos: tokenizer.eos_id}
    vocabulary |= {char: tokenizer.encode(char)[0] for char in tokenizer.alphabet}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    # A dot would leave line ends out.
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in (pad, eos)])
    directory = pathlib.Path(directory)
    backend.save(str(directory / "tokenizer.json"))
    write_tokenizer_config(directory, pad_token=pad, eos_token=eos)


def write_tokenizer_config(directory: pathlib.Path, **entries: Any) -> None:
    """Writes the tokenizer_config.json of a tokenizer.json that speaks for itself."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(config | entries, indent=2) + "\n", encoding="utf-8")


def check_ids(tokenizer: Tokenizer, vocab_size: int, where: str) -> None:
    """Raises UserError if the tokenizer of the model at `where` has ids that the model has not."""
    largest = max(tokenizer.size - 1, tokenizer.pad_id, *tokenizer.eos_ids)
    if largest >= vocab_size or min(tokenizer.pad_id, *tokenizer.eos_ids) < 0:
        raise UserError(
            f"{where}: the tokenizer's ids reach to {largest}, but vocab_size={vocab_size}: they "
            "do not belong together"
        )


def left_pad(
    rows: Sequence[Sequence[int]], length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """(ids [B, length] int32, mask [B, length] bool), rows flush right.

    Raises:
      UserError: a row is longer than `length`.
    """
    ids = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        if len(row) > length:
            raise UserError(
                f"a prompt of {len(row)} tokens does not fit rollout.max_prompt_tokens={length}; "
                "raise it"
            )
        if row:
            ids[i, -len(row) :] = row
            mask[i, -len(row) :] = True
    return ids, mask


def _load_backend(directory: pathlib.Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if (directory / "tokenizer.json").is_file():
        # AutoTokenizer rebuilds the tokenizer of the class that a config names and drops this
        # file's own splitting of text: SmolLM2's GPT2Tokenizer then gets numbers wrong.
        backend = PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
    else:
        backend = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    if not backend.chat_template:
        backend.chat_template = _read_json(directory / "chat_template.json").get("chat_template")
    return backend


def _configs(directory: pathlib.Path) -> list[Mapping[str, Any]]:
    """Where a checkpoint names special ids, the most telling first."""
    config = _read_json(directory / "config.json")
    text_config = config.get("text_config")
    generation = _read_json(directory / "generation_config.json")
    return [generation, config, text_config if isinstance(text_config, dict) else {}]


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a file; {} where there is none."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def _token_ids(config: Mapping[str, Any], key: str, directory: pathlib.Path) -> list[int]:
    """An entry that may be absent, null, one id or a list of them."""
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int or i < 0 for i in ids):
        raise UserError(f"{key}={value!r} in a config of {directory} is no token id; mend it")
    return ids


def first_line(error: Exception) -> str:
    """What an error of another library says, short enough for a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
