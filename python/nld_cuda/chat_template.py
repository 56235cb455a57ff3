"""Turns a conversation into the text a model was trained on, by the checkpoint's own template."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nld_cuda.decode.text import Tokenizer
from nld_cuda.decode.tokenizer_files import special_tokens
from nld_cuda.model.json_files import has_file, read_json_object, read_text

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

TURN_BEGIN, TURN_END = "<|im_start|>", "<|im_end|>"
# For checkpoints that have the tokens of ChatML and no template: a system turn, even an empty one,
# then the turns; the answer starts after an empty thought, or inside one.
CHATML = """\
{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\\n<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' -%}
{{ message.content.split('</think>')[-1] | trim }}
{%- else -%}
{{ message.content }}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{{- '<think>\\n' if enable_thinking else '<think></think>' }}
{%- endif -%}
"""


class ChatTemplate:
    """A Jinja template in the form that checkpoints ship, rendered in Jinja's sandbox."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        origin: str = "chat template",
    ) -> None:
        """Compile a template.

        Args:
            source: the template.
            special_tokens: names the template may use, `bos_token` and `eos_token` among them.
            origin: what errors call it.

        Raises:
            ValueError: it is no template.
        """
        self._origin = origin
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template: Template = _environment().from_string(source)
        except Exception as error:  # Python's own compiler has limits too
            raise ValueError(f"{origin}: must be a Jinja template: {error}") from None

    @classmethod
    def from_folder(
        cls, folder: str | Path, tokenizer: Tokenizer | None = None
    ) -> ChatTemplate | None:
        """Read the template of a checkpoint folder.

        chat_template.jinja, else `chat_template` of chat_template.json or tokenizer_config.json
        (the one named "default" where there are several), else one that comes with the tokenizer
        (Tekken), else ChatML where the tokenizer has its tokens, else None.

        Raises:
            ValueError: a file is no JSON object, or the template is none.
        """
        folder = Path(folder)
        special = special_tokens(folder) if tokenizer is None else tokenizer.special_tokens
        file = folder / "chat_template.jinja"
        if has_file(file):
            return cls(read_text(file), special, str(file))
        for file in (folder / "chat_template.json", folder / "tokenizer_config.json"):
            found = read_json_object(file).get("chat_template") if has_file(file) else None
            if found is not None:
                return cls(_default_template(file, found), special, f"{file}: chat_template")
        if tokenizer is None:
            return None
        if tokenizer.chat_template is not None:
            return cls(tokenizer.chat_template, special, "the tokenizer's own chat template")
        if None not in map(tokenizer.token_id, (TURN_BEGIN, TURN_END)):
            return cls(CHATML, special, "built-in ChatML template")
        return None

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Write out a conversation.

        Args:
            messages: turns with `role` and `content`.
            add_generation_prompt: end where the assistant's next turn begins.
            variables: whatever else the template looks at, such as `enable_thinking`.

        Raises:
            ValueError: the template refuses the conversation, or fails on it.
        """
        try:
            return self._template.render(
                **{
                    "messages": [dict(m) for m in messages],
                    "tools": None,  # templates tell "none" from "not defined"
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                    **self._special_tokens,
                    **variables,
                }
            )
        except Exception as error:  # a template may fail as any program may
            raise ValueError(f"{self._origin}: must accept the conversation: {error}") from None


def _default_template(file: Path, found: Any) -> str:
    """The template, or the one named "default" of a list of named ones."""
    if isinstance(found, list):
        named = {
            entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)
        }
        if "default" not in named:
            raise ValueError(
                f"{file}: chat_template must have an entry named 'default', got {list(named)}"
            )
        found = named["default"]
    if not isinstance(found, str):
        raise ValueError(f"{file}: chat_template must be a text, got {type(found).__name__}")
    return found


class _Generation(Extension):
    """`{% generation %}`: some templates mark the assistant's words with it. Written as it is."""

    tags = {"generation"}  # noqa: RUF012  (a class attribute of Jinja's)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    """The dialect of published chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )

    def to_json(  # Jinja's own escapes for HTML
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment
