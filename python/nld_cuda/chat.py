"""`Chat`: a conversation over one cache, in any mode, turn by turn."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from nld_cuda.chat_template import TURN_END, ChatTemplate
from nld_cuda.decode.generate import GenerateResult
from nld_cuda.decode.images import place_images, prepare_images, with_placeholders
from nld_cuda.decode.session import Session
from nld_cuda.decode.stream import StreamEvent, stream
from nld_cuda.decode.text import Tokenizer
from nld_cuda.model.config import generation_eos_ids

if TYPE_CHECKING:
    from torch import Tensor

    from nld_cuda.api import NLDModel
    from nld_cuda.model.images import ImageInput

MAX_NEW = 256  # as `stream`
THINK_BEGIN, THINK_END = "<think>", "</think>"


class Chat:
    """Asks, streams the answer, remembers both.

    The whole conversation is rendered by the checkpoint's template each time and continued in a
    `Session`, so that only what is new is read. Where a template rewrites earlier turns (most drop
    old thoughts), the cache is rolled back to where the texts part.

    Attributes:
        messages: the conversation, `{"role", "content"}` each; may be edited between turns.
        images: its pictures, prepared, in the order of their placeholders; to be edited with it.
        mode: decode mode of the next answer.
        thinking: whether the model is asked to think first.
        max_thinking_tokens: thoughts are ended after so many tokens; None: no limit.
        session: what is cached.
        eos_token_ids: what ends an answer: the ids in config.json and generation_config.json, the
            tokenizer's own EOS, and the end of a turn in ChatML.
        options: further arguments of `nld_cuda.stream` for every answer.
    """

    def __init__(
        self,
        model: NLDModel,
        *,
        mode: str = "linear_spec",
        system: str | None = None,
        thinking: bool = False,
        max_thinking_tokens: int | None = None,
        template: ChatTemplate | str | None = None,
        **options: Any,
    ) -> None:
        """Start a conversation.

        Args:
            model: from `load`, with a tokenizer.
            mode, thinking, max_thinking_tokens, options: see the attributes.
            system: the system turn, None for the template's own.
            template: another template than the checkpoint's, or the source of one.

        Raises:
            ValueError: no tokenizer, no template, or a budget for a tokenizer without `</think>`.
        """
        if model.tokenizer is None:
            raise ValueError("chat: model must have a tokenizer, found none in its folder")
        if isinstance(template, str):
            template = ChatTemplate(template, model.tokenizer.special_tokens)
        chosen = model.chat_template if template is None else template
        if chosen is None:
            raise ValueError(
                "chat: model must have a chat template (chat_template.jinja, or chat_template in "
                f"tokenizer_config.json) or the tokens of ChatML ({TURN_END}), found neither"
            )
        self.model, self.mode, self.thinking, self.options = model, mode, thinking, options
        self.max_thinking_tokens = max_thinking_tokens
        self.session = Session(model, page_size=options.get("page_size", 16))
        self.messages: list[dict[str, str]] = []
        self.images: list[Tensor] = []
        self._tokenizer, self._template = model.tokenizer, chosen
        self._end_think = self._tokenizer.token_id(THINK_END)
        self.eos_token_ids = _turn_ends(model, self._tokenizer)
        if max_thinking_tokens is not None and self._end_think is None:
            raise ValueError(
                f"chat: max_thinking_tokens must be None, the tokenizer has no {THINK_END}, "
                f"got {max_thinking_tokens}"
            )
        self.restart(system)

    @property
    def end_think_token_id(self) -> int | None:
        """Id of the token that ends thoughts."""
        return self._end_think

    def restart(self, system: str | None) -> None:
        """Forget the conversation, with another system turn (None for the template's own)."""
        self._system = system
        self.reset()

    def reset(self) -> None:
        """Forget the conversation but not the system turn. The cache is kept as far as it fits."""
        self.messages, self.images = [], []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})

    def prompt(self) -> list[int]:
        """Ids of the conversation so far, up to where the assistant's next turn begins."""
        return self._encode(self._text(self.messages))

    def decode_options(self) -> dict[str, Any]:
        """Arguments for `generate` and `stream`, which continue `prompt()` to an answer."""
        budget = self.max_thinking_tokens if self.thinking else None
        return {
            "eos_token_id": self.eos_token_ids,
            "max_thinking_tokens": budget,
            "end_think_token_id": None if budget is None else self._end_think,
            "images": [self.images] if self.images else None,
            **self.options,
        }

    def ask(
        self, text: str, *, images: Sequence[ImageInput] = (), **options: Any
    ) -> Generator[StreamEvent, None, GenerateResult]:
        """Stream the answer to a user turn; both join the conversation when the answer ends.

        A reader that stops early leaves what has been said as the answer. Near the end of the
        model's positions an answer is cut to the room that is left.

        Args:
            text: the user's turn.
            images: pictures of this turn, as `nld_cuda.generate` takes them: one for each
                placeholder in the text, or in front of a text without.
            options: arguments of `nld_cuda.stream` for this answer, over those of the chat.

        Raises:
            ValueError, TypeError, FileNotFoundError, ImportError: as `nld_cuda.stream`, or no room
                is left; the conversation is then as before.
        """
        pixels = prepare_images(self.model, images)
        turn = {"role": "user", "content": with_placeholders(self.model, text, len(pixels))}
        rendered = self._text([*self.messages, turn])
        prompt = self._encode(rendered)
        shown = [*self.images, *pixels]
        options = {"session": self.session, **self.decode_options(), **options}
        options["images"] = [shown] if shown else None
        num_tokens = len(place_images(self.model, prompt, shown)[0])
        limit = self._fitting(num_tokens, options.get("max_new_tokens", MAX_NEW))
        options["max_new_tokens"] = limit
        events = stream(self.model, prompt, options.pop("mode", self.mode), **options)
        opened = THINK_BEGIN + "\n" if rendered.rstrip().endswith(THINK_BEGIN) else ""
        return self._answer(events, turn, opened, pixels)

    def _fitting(self, num_tokens: int, max_new_tokens: Any) -> Any:
        """The limit, or less where the conversation leaves less room; others refuse wrong ones."""
        places = self.model.config.max_position_embeddings
        if num_tokens >= places:
            raise ValueError(
                f"chat: the conversation must fit in the model's {places} places with room for an "
                f"answer, got {num_tokens} tokens: start over (/reset)"
            )
        if isinstance(max_new_tokens, int) and max_new_tokens <= places:
            return min(max_new_tokens, places - num_tokens)
        return max_new_tokens

    def _answer(
        self,
        events: Generator[StreamEvent, None, GenerateResult],
        turn: dict[str, str],
        opened: str,
        pixels: list[Tensor],
    ) -> Generator[StreamEvent, None, GenerateResult]:
        said: list[int] = []
        failed = True
        try:
            while True:
                try:
                    event = next(events)
                except StopIteration as stop:
                    failed = False
                    result: GenerateResult = stop.value
                    return result
                said += event.final_tokens
                yield event
        except GeneratorExit:
            failed = False
            raise
        finally:
            events.close()
            if said or not failed:  # else the conversation is as before
                if said and said[-1] in self.eos_token_ids:
                    said.pop()
                content = opened + self._tokenizer.decode(said, skip_special_tokens=False)
                self.messages += [turn, {"role": "assistant", "content": content}]
                self.images += pixels

    def _encode(self, rendered: str) -> list[int]:
        return self._tokenizer.encode(rendered, add_special_tokens=False)

    def _text(self, messages: list[dict[str, str]]) -> str:
        return self._template.render(messages, enable_thinking=self.thinking)


def _turn_ends(model: NLDModel, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Instruct models end turns with tokens that config.json need not name."""
    config = model.config
    ids = list(config.eos_token_ids)
    if model.folder is not None:
        ids += generation_eos_ids(model.folder, config.vocab_size)
    for text in (tokenizer.special_tokens.get("eos_token"), TURN_END):
        found = None if text is None else tokenizer.token_id(text)
        ids += [] if found is None else [found]
    return tuple(dict.fromkeys(ids))
