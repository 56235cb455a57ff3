"""Tokenizers: ids of tokenizer.json against AutoTokenizer's, Tekken against mistral-common's."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
import transformers

import nld_cuda
from nld_cuda import Chat, ChatTemplate
from nld_cuda.decode.text import IncrementalDecoder, Tokenizer
from tiny_model import config_fields, random_weights, write_checkpoint

TINY = nld_cuda.api.ASSETS / "nld-tiny"
CONFIG = json.loads((TINY / "tokenizer_config.json").read_text())
TEXTS = (
    "hello <bos>wörld <|im_end|> <new> x <eos>é😀 <think>a</think> <a> <img>  <b>",
    "<mask><pad><new2> <sp>z <eos> <x>",
    "add 17+25\n=>\n",
    "",
)
TURNS = [{"role": "user", "content": "x"}]
TEMPLATE = "{{ bos_token }}|{{ eos_token }}|{{ image_token }}|{{ tools is none }}"


def token(text: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"__type": "AddedToken", "content": text, "special": True, **plain, **flags}


def by_id(**tokens: dict[str, Any]) -> dict[str, Any]:
    return {i[1:]: {k: v for k, v in t.items() if k != "__type"} for i, t in tokens.items()}


CUT = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
PAD = {
    "strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
    "pad_type_id": 0, "pad_token": "<pad>",
}  # fmt: skip
# Files of a folder beside or over those of nld-tiny: name -> changed fields.
FOLDERS: dict[str, dict[str, dict[str, Any]]] = {
    "as it is": {},
    "BOS and EOS asked for": {"tokenizer_config": {"add_bos_token": True, "add_eos_token": True}},
    "no BOS asked for": {"tokenizer_config": {"add_bos_token": False}},
    "no post-processor": {
        "tokenizer": {"post_processor": None},
        "tokenizer_config": {"add_bos_token": True},
    },
    "cut and padded": {"tokenizer": {"truncation": CUT, "padding": PAD}},
    "tokens by id": {
        "tokenizer_config": {
            "added_tokens_decoder": by_id(
                _361=token("<new>"), _362=token("<new2>", special=False, rstrip=True, lstrip=True)
            )
        }
    },
    "other flags": {
        "tokenizer_config": {
            "added_tokens_decoder": by_id(
                _2=token("<eos>", special=False, rstrip=True), _1=token("<bos>", lstrip=True)
            )
        }
    },
    "additional tokens": {
        "tokenizer_config": {"additional_special_tokens": ["<a>", token("<b>", lstrip=True)]}
    },
    "extra tokens": {
        "tokenizer_config": {
            "extra_special_tokens": {"image_token": "<img>"}, "vision_token": "<a>",
        }
    },
    "named tokens": {
        "tokenizer_config": {
            "bos_token": "<new>", "unk_token": "<x>", "eos_token": token("<a>", lstrip=True),
        }
    },
    "special_tokens_map": {
        "tokenizer_config": {"bos_token": None},
        "special_tokens_map": {
            "bos_token": token("<new>", lstrip=True), "additional_special_tokens": ["<a>"],
        },
    },
    "special_tokens_map out of use": {
        "tokenizer_config": {"added_tokens_decoder": {}},
        "special_tokens_map": {"bos_token": "<new>"},
    },
    "added_tokens": {
        "special_tokens_map": {"unk_token": "<sp>"},
        "added_tokens": {"<new>": 361, "<sp>": 362, "<a>": 363},
    },
    "special tokens are text": {"tokenizer_config": {"split_special_tokens": True}},
    "spaces cleaned up": {"tokenizer_config": {"clean_up_tokenization_spaces": True}},
    "another class": {"tokenizer_config": {"tokenizer_class": "LlamaTokenizerFast"}},
}  # fmt: skip


def no_network(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("a tokenizer must be read without the network")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)


def folder_with(folder: Path, **files: dict[str, Any]) -> Path:
    """config.json, tokenizer and its config of nld-tiny, with other fields."""
    files.setdefault("tokenizer_config", {})
    files["tokenizer_config"] = {"chat_template": TEMPLATE, **files["tokenizer_config"]}
    for name in {"config", "tokenizer", *files}:
        source = TINY / f"{name}.json"
        fields = json.loads(source.read_text()) if source.is_file() else {}
        (folder / f"{name}.json").write_text(json.dumps(fields | files.get(name, {})))
    return folder


def ours(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    return tokenizer


def rendered(folder: Path, tokenizer: Tokenizer, turns: list[dict[str, str]] = TURNS) -> str:
    template = ChatTemplate.from_folder(folder, tokenizer)
    assert template is not None
    return template.render(turns)


@pytest.mark.parametrize("case", FOLDERS)
def test_tokenizer_json_as_auto_tokenizer(case: str, tmp_path: Path) -> None:
    """The same ids, texts and prompts without transformers, whatever its other files ask for."""
    folder = folder_with(tmp_path, **FOLDERS[case])
    mine, theirs = ours(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert mine.vocab_size == len(theirs)
    for text in TEXTS:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert mine.encode(text, add_special_tokens=special) == ids
            for skip in (True, False):
                assert mine.decode(ids, skip_special_tokens=skip) == theirs.decode(
                    ids, skip_special_tokens=skip
                )
    expected = theirs.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    assert rendered(folder, mine) == expected


def test_tokenizer_json_needs_tokenizers_alone() -> None:
    """transformers is neither needed nor, since importing it takes seconds, imported."""
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "import nld_cuda\n"
        "model = nld_cuda.load('nld-tiny', device='cpu')\n"
        "assert model.tokenizer.decode(model.tokenizer.encode('add 1+2')) == 'add 1+2'\n"
        "assert next(nld_cuda.Chat(model).ask('add 1+2')).final_tokens\n"
    )
    package = str(Path(nld_cuda.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": package}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_nothing_of_a_checkpoint_is_executed(tmp_path: Path) -> None:
    """Python files beside a tokenizer, and the fields that ask for them, are not even looked at."""
    code = {"AutoTokenizer": [None, "evil.Evil"]}
    folder = folder_with(tmp_path, tokenizer_config={"tokenizer_class": "Evil", "auto_map": code})
    (folder / "evil.py").write_text("raise SystemExit('executed')")
    assert ours(folder).encode("add") == Tokenizer.from_folder(TINY).encode("add")  # type: ignore[union-attr]
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(ValueError, match=r"tokenizer\.model: "):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    "file,text,message",
    [
        ("tokenizer.json", "{", "must be a tokenizer in JSON form"),
        ("tokenizer.json", "\xff", "must be a tokenizer in JSON form"),
        ("tokenizer_config.json", "[]", "must hold a JSON object, got list"),
        ("tokenizer_config.json", '{"bos_token": 5}', "bos_token must be a token's text or an obj"),
        ("tokenizer_config.json", '{"eos_token": {"a": 1}}', "eos_token must be a token's text"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "added_tokens_decoder must be"),
        ("special_tokens_map.json", '{"eos_token": 5}', "special_tokens_map.json: eos_token must"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": "y"}}',
            "an object with ids as keys",
        ),
        ("tokenizer_config.json", '{"extra_special_tokens": 7}', "extra_special_tokens must be a"),
        ("special_tokens_map.json", "\xff", "must be text in UTF-8"),
        ("added_tokens.json", '{"a": "b"}', "'a' must have an id, got 'b'"),
        ("tekken.json", "{}", "must be a Tekken vocabulary, got: "),
        ("tokenizer.model", "x", "tokenizer.model: "),
        ("vocab.json", "[]", "must be a tokenizer that transformers can convert, got: "),
    ],
)
def test_damaged_files(file: str, text: str, message: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    if file in ("tekken.json", "tokenizer.model", "vocab.json"):
        (folder / "tokenizer.json").unlink()
    (folder / file).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError) as error:
        Tokenizer.from_folder(folder)
    assert file in str(error.value) and message in str(error.value)


def test_packages_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    find = importlib.util.find_spec
    missing = "google.protobuf"
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == missing else find(n))
    pattern = r"tokenizer\.model: needs the package .* \(pip install 'nld-cuda\[hf\]'\)"
    with pytest.raises(ValueError, match=pattern):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tekken.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers.integrations.mistral", None)
    with pytest.raises(ValueError, match=r"needs more packages \(pip install 'nld-cuda\[hf\]'\)"):
        Tokenizer.from_folder(tmp_path)


def test_named_templates(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    folder = folder_with(tmp_path, tokenizer_config={"chat_template": several})
    assert rendered(folder, ours(folder)) == "D"
    for wrong, message in (
        (several[:1], r"must have an entry named 'default', got \['tool_use'\]"),
        ([1], r"must have an entry named 'default', got \[\]"),
        ({"a": 1}, "must be a text, got dict"),
    ):
        folder_with(tmp_path, tokenizer_config={"chat_template": wrong})
        with pytest.raises(ValueError, match=r"tokenizer_config\.json: chat_template " + message):
            rendered(folder, ours(folder))


# ---- Tekken: 131072 ids, as the published models have --------------------------------------------

SCRIPTS = (
    "Hello wörld 😀 👩‍👩‍👧‍👦 🇩🇪 日本語テキスト 中文 한국어 العربية עברית हिन्दी ไทย "
    "Ελληνικά русский ქართული "
    "\t\n\n  x=1234567 def f():\n    return 'ß'\r\n ṩ́ \u0000 \ufffd \U0010ffff"
)
LENGTHS = ("", " ", "  leading", "trailing  ", "a" * 1000, "\n" * 50, "日" * 300, "7" * 99)


@pytest.fixture(scope="module")
def tekken_model(tmp_path_factory: pytest.TempPathFactory) -> nld_cuda.NLDModel:
    """Random weights and the vocabulary of the published models."""
    mistral_common = pytest.importorskip(
        "mistral_common", reason="mistral-common, whose vocabulary is used, needs Python 3.11"
    )
    folder = tmp_path_factory.mktemp("tekken")
    data = Path(mistral_common.__file__).parent / "data"
    shutil.copy(data / "tekken_240911.json", folder / "tekken.json")
    fields = config_fields(
        vocab_size=131072, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, mask_token_id=100,
    )  # fmt: skip
    write_checkpoint(folder, fields, random_weights(fields))
    return nld_cuda.load(folder, device="cpu")


@pytest.fixture
def tekken(tekken_model: nld_cuda.NLDModel) -> tuple[Path, Tokenizer]:
    assert tekken_model.tokenizer is not None and tekken_model.folder is not None
    return tekken_model.folder, tekken_model.tokenizer


def test_tekken_as_mistral_common(tekken: tuple[Path, Tokenizer]) -> None:
    """Ids, BOS and conversations of an independent encoder."""
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    folder, tokenizer = tekken
    theirs = MistralTokenizer.from_file(folder / "tekken.json")
    encoder = theirs.instruct_tokenizer.tokenizer
    assert tokenizer.vocab_size == encoder.n_words == 131072
    assert tokenizer.special_tokens["eos_token"] == "</s>" and tokenizer.token_id("</s>") == 2
    for text in (SCRIPTS, *SCRIPTS.split(" "), *LENGTHS):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == encoder.encode(text, bos=False, eos=False)
        assert tokenizer.encode(text) == [1, *ids]
        assert tokenizer.decode([1, *ids, 2]) == text
    turns = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 😀"},
        {"role": "assistant", "content": "Yo."}, {"role": "user", "content": "  and? "},
    ]  # fmt: skip
    prompt = rendered(folder, tokenizer, turns)
    expected = theirs.encode_chat_completion(ChatCompletionRequest(messages=turns))
    assert tokenizer.encode(prompt, add_special_tokens=False) == expected.tokens


def test_tekken_token_by_token(tekken: tuple[Path, Tokenizer]) -> None:
    """Pieces join to the whole, never with half a character, in time that grows with the text."""
    _, tokenizer = tekken
    ids = tokenizer.encode(SCRIPTS.replace("\ufffd", "") * 100)
    decoder, pieces = IncrementalDecoder(tokenizer), []
    start = time.perf_counter()
    for token_id in ids:
        pieces.append(decoder.push([token_id]))
    seconds = time.perf_counter() - start
    assert "".join(pieces) + decoder.finish() == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert seconds < 1e-3 * len(ids)


def test_a_conversation_in_tekken(
    tekken_model: nld_cuda.NLDModel, tekken: tuple[Path, Tokenizer]
) -> None:
    """Turns over one cache, streamed, modes changed in between."""
    folder, tokenizer = tekken
    chat = Chat(tekken_model, max_new_tokens=12)
    for mode in ("linear_spec", "diffusion", "ar"):
        chat.mode, shown = mode, ""
        turns = [*chat.messages, {"role": "user", "content": "héllo 😀"}]
        for event in chat.ask("héllo 😀", temperature=2.0, seed=5):
            shown += event.final
        ids = tokenizer.encode(rendered(folder, tokenizer, turns), add_special_tokens=False)
        options = {"max_new_tokens": 12, "temperature": 2.0, "seed": 5}
        fresh = nld_cuda.generate(chat.model, ids, mode, **options)
        assert event.result is not None and event.result.tokens == fresh.tokens
        assert fresh.text == [shown]
        assert chat.session.num_reused >= (0 if mode == "linear_spec" else 7)


def test_saved_tokenizer_json_of_that_size(tekken: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    """The published form of the same vocabulary: tokenizer.json alone."""
    tekken[1]._tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer = ours(tmp_path)
    assert tokenizer.vocab_size == 131072
    assert tokenizer.encode(SCRIPTS) == tekken[1].encode(SCRIPTS)


def test_sentencepiece_as_auto_tokenizer(tmp_path: Path) -> None:
    mistral_common = pytest.importorskip("mistral_common", reason="its vocabulary is used")
    pytest.importorskip("sentencepiece")
    data = Path(mistral_common.__file__).parent / "data"
    shutil.copy(data / "mistral_instruct_tokenizer_240323.model.v3", tmp_path / "tokenizer.model")
    shutil.copy(TINY / "config.json", tmp_path)
    fields = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    mine, theirs = ours(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Hello wörld 😀", " a  b", "日本語 x", "\n\nif x:\n\treturn", ""):
        ids = mine.encode(text)
        assert ids == theirs.encode(text) and mine.decode(ids) == theirs.decode(
            ids, skip_special_tokens=True
        )
        decoder = IncrementalDecoder(mine)
        pieces = [decoder.push([token_id]) for token_id in ids]
        assert "".join(pieces) + decoder.finish() == mine.decode(ids)
        assert not any("\ufffd" in piece for piece in pieces)
    assert rendered(tmp_path, mine).startswith("<s>|</s>|")
