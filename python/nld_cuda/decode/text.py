"""Text to ids and back, with the checkpoint's own tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer as _Tokenizer

from nld_cuda.decode.tokenizer_files import read_tokenizer

REPLACEMENT = "\ufffd"  # what an incomplete multi-byte character decodes to


class Tokenizer:
    """A thin wrapper around `tokenizers`, which does the work.

    Attributes:
        special_tokens: names and texts of special tokens, such as `bos_token`.
        chat_template: Jinja source that comes with the tokenizer itself, None where it has none.
    """

    def __init__(
        self,
        backend: _Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        self._tokenizer = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer | None:
        """Read the tokenizer of a checkpoint folder; None where there is none.

        Raises:
            ValueError: a file is damaged, or the package that reads it is not installed.
        """
        found = read_tokenizer(Path(folder))
        return None if found is None else cls(**vars(found))

    @property
    def vocab_size(self) -> int:
        """Ids in all, added tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, with or without the special tokens that the tokenizer itself adds.

        Raises:
            ValueError: the text holds halves of characters (what Python reads from bytes that are
                not UTF-8).
        """
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError:
            raise ValueError(f"text must be valid Unicode, got {text[:80]!r}") from None

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids; ids the tokenizer does not know decode to nothing."""
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        return str(text)

    def token_id(self, token: str) -> int | None:
        """Id of a token given by its exact text, None where it does not exist."""
        found = self._tokenizer.token_to_id(token)
        return None if found is None else int(found)


class IncrementalDecoder:
    """Text of a growing list of ids, piece by piece.

    A token may hold part of a character, and its text may depend on the token before it (spaces).
    So each piece is the difference of two decodings that start at the same earlier token, and a
    piece that ends in an incomplete character is held back until it is complete.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = 0  # first token of the decoded window
        self._emitted = 0  # tokens whose text has been handed out

    def push(self, tokens: Sequence[int]) -> str:
        """Add ids and return the text that became complete."""
        self._tokens += tokens
        return self._take(final=False)

    def finish(self) -> str:
        """Return what is left, incomplete characters as U+FFFD."""
        return self._take(final=True)

    def preview(self, tokens: Sequence[int]) -> str:
        """Text that `tokens` would add (after what is held back), without taking them."""
        before, after = self._window([]), self._window(tokens)
        return after[len(before) :]

    def _window(self, more: Sequence[int], end: int | None = None) -> str:
        end = self._emitted if end is None else end
        kept = self._tokens[self._start : end]
        if not more:
            return self._tokenizer.decode(kept)
        return self._tokenizer.decode([*kept, *self._tokens[end:], *more])

    def _take(self, final: bool) -> str:
        before = self._window([])
        after = self._window([], len(self._tokens))
        if not final and after.endswith(REPLACEMENT):
            return ""
        self._start, self._emitted = self._emitted, len(self._tokens)
        return after[len(before) :]
