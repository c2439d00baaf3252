"""The byte-level BPE tokenizer of a run, and how an example becomes tokens."""

import os
from collections.abc import Container, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fastattn.runtime import files
from fastattn.train.data.jsonl import Example

if TYPE_CHECKING:
    import tokenizers

START, END_OF_PROMPT, END_OF_RESPONSE = "<|im_start|>", "<|im_end|>", "<|box_end|>"
SPECIAL_TOKENS = (START, END_OF_PROMPT, END_OF_RESPONSE)
FILE_NAME = "tokenizer.json"
# HRM-Text's conditions are tokens that its tokenizer had for something else (scripts/prepare_sft_data.py there).
CONDITIONS = {
    "direct": "<|object_ref_start|>",
    "cot": "<|object_ref_end|>",
    "noisy": "<|quad_start|>",
    "synth": "<|quad_end|>",
}


class Sample(NamedTuple):
    """`<|im_start|>` condition instruction `<|im_end|>` | response `<|box_end|>`, as token ids."""

    tokens: list[int]
    prefix_length: int  # tokens before the bar, which see each other both ways


class Tokenizer:
    """Text to ids and back. Text that spells a special token is taken as ordinary text.

    A condition is a sequence of tags. A tag is a special token of the tokenizer, spelled in full (`<|cot|>`) or without
    its `<|` and `|>`. HRM-Text's conditions, direct, cot, noisy and synth, are the tokens that its own code takes for them
    (CONDITIONS), unless the tokenizer has one of that name. Truncation and padding that a tokenizer.json was saved with are not applied.
    """

    def __init__(self, inner: "tokenizers.Tokenizer"):
        missing = [token for token in SPECIAL_TOKENS if inner.token_to_id(token) is None]
        if missing:
            raise ValueError(f"tokenizer: has no token {', '.join(missing)}")
        inner.encode_special_tokens = True
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self.start, self.end_of_prompt, self.end_of_response = map(inner.token_to_id, SPECIAL_TOKENS)
        added = {token.content: number for number, token in inner.get_added_tokens_decoder().items()}
        self.tags = {token: number for token, number in added.items() if token not in SPECIAL_TOKENS}

    @classmethod
    def train(
        cls, examples: Iterable[Example], vocab_size: int, more_tags: Iterable[str] = ()
    ) -> "Tokenizer":
        """Learns at most `vocab_size` tokens (256 bytes and the special ones, tags too, included) from `examples`."""
        tokenizers = _tokenizers()
        examples = list(examples)
        tags = sorted({_spelled(tag) for tag in (*tags_of(examples), *more_tags)} - {*SPECIAL_TOKENS})
        smallest = 256 + len(SPECIAL_TOKENS) + len(tags)
        if vocab_size < smallest:
            raise ValueError(f"tokenizer: vocab_size is {vocab_size}; at least {smallest} are needed")
        inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[*SPECIAL_TOKENS, *tags],
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        texts = (text for example in examples for text in (example.instruction, example.response))
        inner.train_from_iterator(texts, trainer)
        return cls(inner)

    @classmethod
    def load(cls, folder: str | os.PathLike, added: Iterable[str] | None = None) -> "Tokenizer":
        """Reads `tokenizer.json` in `folder`, or the file itself; FileNotFoundError or ValueError if that is no tokenizer.

        `added`: special tokens that it gets where it lacks them: these tags, and those of the format. Default: none, and
        those of the format have to be there.
        """
        path = Path(folder)
        path = path if path.is_file() else path / FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; a model folder holds one")
        tokenizers = _tokenizers()
        try:
            inner = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path}: not a tokenizer: {error}") from None
        if added is not None:
            known = {token.content for token in inner.get_added_tokens_decoder().values()}
            wanted = [*SPECIAL_TOKENS, *(_token_of(tag, known) for tag in added)]
            inner.add_special_tokens([token for token in dict.fromkeys(wanted) if token not in known])
        try:
            return cls(inner)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, folder: str | os.PathLike) -> None:
        files.write_text(Path(folder) / FILE_NAME, self._inner.to_str(pretty=True))

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: ids may have gaps."""
        return max(self._inner.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        return self._inner.decode(tokens, skip_special_tokens=True)

    def condition(self, tags: Iterable[str]) -> list[int]:
        """The tokens of tags; ValueError naming one that the tokenizer does not have."""
        ids = []
        for tag in tags:
            known = _token_of(tag, self.tags)
            if known not in self.tags:
                raise ValueError(
                    f"condition: {tag!r} is no special token of the tokenizer; it has "
                    f"{', '.join(sorted(self.tags)) or 'none but those of the format'}"
                )
            ids.append(self.tags[known])
        return ids

    def prompt(self, instruction: str, condition: Iterable[str] = ()) -> list[int]:
        """The tokens before the response."""
        if not instruction.strip():
            raise ValueError("prompt: is empty")
        if not files.is_unicode(instruction):
            raise ValueError("prompt: is not UTF-8")
        return [self.start, *self.condition(condition), *self.encode(instruction), self.end_of_prompt]

    def samples(self, examples: list[Example], longest: int | None = None) -> list[Sample]:
        """What a model trains on. ValueError naming the file and line of a sample of more than `longest` tokens, or of a tag
        that the tokenizer does not have."""
        prompts = self._inner.encode_batch([e.instruction for e in examples], add_special_tokens=False)
        responses = self._inner.encode_batch([e.response for e in examples], add_special_tokens=False)
        samples = []
        for number, (example, p, r) in enumerate(zip(examples, prompts, responses, strict=True), 1):
            where = example.where or f"example {number}"
            try:
                condition = self.condition(example.condition)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            prompt = [self.start, *condition, *p.ids, self.end_of_prompt]
            tokens = [*prompt, *r.ids, self.end_of_response]
            if longest is not None and len(tokens) > longest:
                raise ValueError(f"{where}: has {len(tokens)} tokens; at most {longest} are allowed")
            samples.append(Sample(tokens, len(prompt)))
        return samples

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


def tags_of(examples: Iterable[Example]) -> list[str]:
    """The tags of their conditions, each once."""
    return sorted({tag for example in examples for tag in example.condition})


def _token_of(tag: str, known: Container[str]) -> str:
    """The special token of a tag, where those of `known` are there."""
    if tag in known:
        return tag
    spelled, theirs = _spelled(tag), CONDITIONS.get(tag)
    return theirs if theirs is not None and spelled not in known and theirs in known else spelled


def _spelled(tag: str) -> str:
    return tag if tag.startswith("<|") and tag.endswith("|>") else f"<|{tag}|>"


def _tokenizers():
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the tokenizers package is missing: pip install 'fastattn[train]'", name=error.name
        ) from None
    return tokenizers
