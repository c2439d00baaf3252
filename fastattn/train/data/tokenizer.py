"""The byte-level BPE tokenizer of a run, and how an example becomes tokens."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fastattn.runtime import files
from fastattn.train.data.jsonl import Example

if TYPE_CHECKING:
    import tokenizers

START, END_OF_PROMPT, END_OF_RESPONSE = "<|im_start|>", "<|im_end|>", "<|box_end|>"
SPECIAL_TOKENS = (START, END_OF_PROMPT, END_OF_RESPONSE)
FILE_NAME = "tokenizer.json"


class Sample(NamedTuple):
    """`<|im_start|>` instruction `<|im_end|>` | response `<|box_end|>`, as token ids."""

    tokens: list[int]
    prefix_length: int  # tokens before the bar, which see each other both ways


class Tokenizer:
    """Text to ids and back. Text that spells a special token is taken as ordinary text."""

    def __init__(self, inner: "tokenizers.Tokenizer"):
        missing = [token for token in SPECIAL_TOKENS if inner.token_to_id(token) is None]
        if missing:
            raise ValueError(f"tokenizer: has no token {', '.join(missing)}")
        inner.encode_special_tokens = True
        self._inner = inner
        self.start, self.end_of_prompt, self.end_of_response = map(inner.token_to_id, SPECIAL_TOKENS)

    @classmethod
    def train(cls, examples: Iterable[Example], vocab_size: int) -> "Tokenizer":
        """Learns at most `vocab_size` tokens (256 bytes and the special ones included) from `examples`."""
        tokenizers = _tokenizers()
        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise ValueError(f"tokenizer: vocab_size is {vocab_size}; at least {smallest} are needed")
        inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator((text for example in examples for text in example), trainer)
        return cls(inner)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Tokenizer":
        """Reads `tokenizer.json` in `folder`; FileNotFoundError or ValueError if that is no tokenizer."""
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; a model folder holds one")
        tokenizers = _tokenizers()
        try:
            inner = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path}: not a tokenizer: {error}") from None
        return cls(inner)

    def save(self, folder: str | os.PathLike) -> None:
        files.write_text(Path(folder) / FILE_NAME, self._inner.to_str(pretty=True))

    @property
    def vocab_size(self) -> int:
        return self._inner.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        return self._inner.decode(tokens, skip_special_tokens=True)

    def prompt(self, instruction: str) -> list[int]:
        """The tokens before the response."""
        if not instruction.strip():
            raise ValueError("prompt: is empty")
        if not files.is_unicode(instruction):
            raise ValueError("prompt: is not UTF-8")
        return [self.start, *self.encode(instruction), self.end_of_prompt]

    def samples(self, examples: list[Example]) -> list[Sample]:
        prompts = self._inner.encode_batch([e.instruction for e in examples], add_special_tokens=False)
        responses = self._inner.encode_batch([e.response for e in examples], add_special_tokens=False)
        return [
            Sample([self.start, *p.ids, self.end_of_prompt, *r.ids, self.end_of_response], len(p.ids) + 2)
            for p, r in zip(prompts, responses, strict=True)
        ]

    def text_stream(self) -> "TextStream":
        return TextStream(self)


class TextStream:
    """Text of tokens that come one at a time: a character is given out once all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = ""

    def push(self, token: int) -> str:
        """What `token` adds; "" while a character is incomplete."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        return "" if text.endswith("\N{REPLACEMENT CHARACTER}") else self._rest(text)

    def finish(self) -> str:
        """What is left, an incomplete character shown as U+FFFD."""
        return self._rest(self._tokenizer.decode(self._tokens))

    def _rest(self, text: str) -> str:
        new, self._shown = text[len(self._shown) :], text
        return new


def _tokenizers():
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the tokenizers package is missing: pip install 'fastattn[train]'", name=error.name
        ) from None
    return tokenizers
