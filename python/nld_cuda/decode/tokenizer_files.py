"""A checkpoint's tokenizer, in whichever form it is stored. Nothing in it is executed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from nld_cuda.model.json_files import has_file, read_json_object

INSTALL = "pip install 'nld-cuda[hf]'"  # transformers and what it converts other files with
_SENTENCEPIECE, _TEKKEN, _VOCABULARY = "tokenizer.model", "tekken.json", "vocab.json"
_ORDER = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


@dataclass(frozen=True)
class TokenizerFiles:
    """What a folder says about its tokenizer.

    Attributes:
        backend: text to ids and back.
        special_tokens: names and texts of special tokens, such as `bos_token`.
        chat_template: one that comes with the tokenizer itself; templates in files of their own
            are `ChatTemplate`'s.
    """

    backend: Backend
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None


def read_tokenizer(folder: Path) -> TokenizerFiles | None:
    """Read the tokenizer of a checkpoint folder; None where it has none.

    tokenizer.json is read with `tokenizers` alone, to the ids of transformers' AutoTokenizer (5.x):
    tokens that only tokenizer_config.json (or the older special_tokens_map.json and
    added_tokens.json) names are added, cutting and padding are off, and its own post-processor
    decides about BOS and EOS. Other forms (tekken.json, SentencePiece's tokenizer.model, vocab.json
    with merges.txt) are converted by transformers, from these files alone.

    Raises:
        ValueError: a file is damaged, or its package is not installed.
    """
    file = folder / "tokenizer.json"
    if has_file(file):
        with _no_other_errors(file, "a tokenizer in JSON form"):
            backend = Backend.from_file(str(file))
            backend.no_truncation()
            backend.no_padding()
            backend.encode("a")  # some faults of a file show only now
        return TokenizerFiles(backend, _add_named_tokens(backend, folder))
    if has_file(folder / _TEKKEN):
        return _from_tekken(folder / _TEKKEN)
    for name in (_SENTENCEPIECE, _VOCABULARY):
        if has_file(folder / name):
            return _from_auto_tokenizer(folder / name)
    return None


def special_tokens(folder: Path) -> dict[str, str]:
    """Names and texts of the special tokens that the configuration files of a folder name."""
    return {name: str(token) for name, token in _Named.read(folder).named.items()}


@dataclass(frozen=True)
class _Named:
    """Tokens that stand in configuration files: by name, by id, and without either."""

    named: dict[str, AddedToken]
    by_id: dict[int, AddedToken]
    extra: list[AddedToken]
    split_special: bool

    @classmethod
    def read(cls, folder: Path) -> _Named:
        file, older_file = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
        fields = _json_object(file)
        stored_by_id = "added_tokens_decoder" in fields  # older versions of transformers did not
        older = {} if stored_by_id else _json_object(older_file)
        extra_name, extra = next(
            (
                (name, where[name])
                for where in (fields, older)
                for name in ("extra_special_tokens", "additional_special_tokens")
                if where.get(name)
            ),
            ("extra_special_tokens", []),
        )
        origin = dict.fromkeys(fields, file) | dict.fromkeys(older, older_file)
        fields = dict.fromkeys(_ORDER) | fields | older
        if isinstance(extra, dict):  # names of the model's own: as if they were fields
            origin |= dict.fromkeys(extra, origin[extra_name])
            fields |= extra
            extra = []
        if not isinstance(extra, list):
            raise ValueError(
                f"{origin[extra_name]}: {extra_name} must be a list or an object, got {extra!r}"
            )
        named = {
            name: _token(origin[name], name, value)
            for name, value in fields.items()
            if name.endswith("_token") and value is not None and not isinstance(value, bool)
        }
        extras = [_token(origin[extra_name], extra_name, value) for value in extra]
        if stored_by_id:
            by_id = _tokens_by_id(file, fields["added_tokens_decoder"])
        else:
            special = {str(token) for token in (*named.values(), *extras)}
            by_id = _older_tokens_by_id(folder / "added_tokens.json", special)
        return cls(named, by_id, extras, fields.get("split_special_tokens") is True)


def _tokens_by_id(file: Path, found: Any) -> dict[int, AddedToken]:
    if not isinstance(found, dict) or not all(key.isdecimal() for key in found):
        raise ValueError(
            f"{file}: added_tokens_decoder must be an object with ids as keys, got {found!r:.300}"
        )
    return {
        int(key): _token(file, f"added_tokens_decoder.{key}", value, special=False)
        for key, value in found.items()
    }


def _older_tokens_by_id(file: Path, special: set[str]) -> dict[int, AddedToken]:
    tokens = {}
    for text, number in _json_object(file).items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise ValueError(f"{file}: {text!r} must have an id, got {number!r}")
        is_special = text in special
        tokens[number] = AddedToken(text, normalized=not is_special, special=is_special)
    return tokens


def _add_named_tokens(backend: Backend, folder: Path) -> dict[str, str]:
    """Add what only configuration files name, in transformers' order: new ones get the next ids."""
    found = _Named.read(folder)
    backend.add_tokens([found.by_id[i] for i in sorted(found.by_id)])
    added = {str(token) for token in backend.get_added_tokens_decoder().values()}
    for token in (*found.named.values(), *found.extra):
        if str(token) not in added:
            backend.add_tokens([token])
            added.add(str(token))
    backend.encode_special_tokens = found.split_special
    return {name: str(token) for name, token in found.named.items()}


def _token(file: Path, name: str, value: Any, special: bool = True) -> AddedToken:
    """A token given by its text, or by an object that may hold flags too."""
    flags: dict[str, Any] = {"special": special}
    text = value
    if isinstance(value, dict):
        text = value.get("content")
        flags |= {flag: value[flag] for flag in _FLAGS if isinstance(value.get(flag), bool)}
    if not isinstance(text, str):
        raise ValueError(
            f"{file}: {name} must be a token's text or an object with its content, got {value!r}"
        )
    return AddedToken(text, **flags)


def _from_tekken(file: Path) -> TokenizerFiles:
    """Mistral's own form. Prompts begin with BOS, as mistral-common's do."""
    with _no_other_errors(file, "a Tekken vocabulary"), _quiet_transformers():
        from transformers.integrations.mistral import convert_tekken_tokenizer

        converted = convert_tekken_tokenizer(str(file))
        backend = converted.backend_tokenizer
        bos = converted.bos_token
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, converted.bos_token_id)]
        )
        return TokenizerFiles(backend, converted.special_tokens_map, converted.chat_template)


def _from_auto_tokenizer(file: Path) -> TokenizerFiles:
    if file.name == _SENTENCEPIECE:  # transformers would go on to guess another format
        for package in ("sentencepiece", "google.protobuf"):
            if not _is_installed(package):
                raise ValueError(f"{file}: needs the package {package} ({INSTALL})")
    with _no_other_errors(file, "a tokenizer that transformers can convert"), _quiet_transformers():
        from transformers import AutoTokenizer

        converted = AutoTokenizer.from_pretrained(
            str(file.parent), local_files_only=True, trust_remote_code=False
        )
        backend = getattr(converted, "backend_tokenizer", None)
        if not isinstance(backend, Backend):
            raise ValueError(f"{type(converted).__name__} has no form that `tokenizers` can run")
        backend.no_truncation()
        backend.no_padding()
        return TokenizerFiles(backend, converted.special_tokens_map)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package around it
        return False


@contextmanager
def _no_other_errors(file: Path, what: str) -> Iterator[None]:
    """Turn whatever goes wrong while others read a file into one error that names it."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except ImportError as error:
        raise ValueError(
            f"{file}: a checkpoint without tokenizer.json needs more packages ({INSTALL}): {error}"
        ) from None
    except BaseException as error:  # the library raises plain Exception, and panics
        raise ValueError(f"{file}: must be {what}, got: {error}") from None


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No notes about fields of config.json: it is read by this package, not by transformers."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _json_object(file: Path) -> dict[str, Any]:
    """What a file holds; nothing where there is none."""
    return read_json_object(file) if has_file(file) else {}
