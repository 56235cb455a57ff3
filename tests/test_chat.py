"""Chat: templates against transformers, turns over one cache against fresh calls, the command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import nld_cuda
from interrupted import Interrupted
from nld_cuda import Chat, ChatTemplate, cli
from nld_cuda.chat_template import CHATML
from nld_cuda.cli import build_parser
from nld_cuda.cli_chat import Console
from tiny_model import config_fields, random_weights, write_checkpoint

TINY = nld_cuda.api.ASSETS / "nld-tiny"
BRACKETS = """{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
[INST] {{ message['content'] | trim }} [/INST]
    {%- elif message['role'] == 'system' %}
        {%- continue %}
    {%- else %}
{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
"""
STRICT = """{% set ns = namespace(turn=0) %}
{% for m in messages %}
  {% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('turns must alternate') }}
  {% endif %}
  {% set ns.turn = ns.turn + 1 %}
{{ m | tojson(indent=1) }} {{ ns.turn }} {{ strftime_now('%Y') }}
  {% if ns.turn == 4 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ {"go": "é<", "n": enable_thinking | default(none)} | tojson }}
{% endif %}
"""


@pytest.fixture(scope="module")
def their_tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(TINY)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("source", [CHATML, BRACKETS, STRICT], ids=["chatml", "brackets", "strict"])
def test_templates_render_as_in_transformers(
    source: str, data: st.DataObject, their_tokenizer: Any
) -> None:
    text = st.text(alphabet="ab \n<>é'\"{}%", max_size=12)
    turns = data.draw(st.integers(1, 5))
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": data.draw(text)} for i in range(turns)
    ]
    if source != STRICT and data.draw(st.booleans()):
        messages.insert(0, {"role": "system", "content": data.draw(text)})
    options = {
        "add_generation_prompt": data.draw(st.booleans()),
        "enable_thinking": data.draw(st.booleans()),
    }
    ours = ChatTemplate(source, {"bos_token": "<bos>", "eos_token": "<eos>"})
    expected = their_tokenizer.apply_chat_template(
        messages, chat_template=source, tokenize=False, **options
    )
    assert ours.render(messages, **options) == expected


def test_template_errors() -> None:
    with pytest.raises(ValueError, match=r"x\.jinja: must be a Jinja template: .*endfor"):
        ChatTemplate("{% for m in messages %}", origin="x.jinja")
    for deep in ("{% if 1 %}" * 150 + "{% endif %}" * 150, "{{ " + "(" * 9999 + ")" * 9999 + " }}"):
        with pytest.raises(ValueError, match="must be a Jinja template"):
            ChatTemplate(deep)
    turns = [{"role": "assistant", "content": "a"}]
    for broken in ("{{ 1 // 0 }}", "{{ messages[7].content.x }}", "{{ 'a'.format.x.y }}"):
        with pytest.raises(ValueError, match="must accept the conversation"):
            ChatTemplate(broken).render(turns)
    with pytest.raises(ValueError, match="must accept the conversation: turns must alternate"):
        ChatTemplate(STRICT).render(turns)
    for attack in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/passwd' %}",
    ):
        with pytest.raises(ValueError, match="must accept the conversation"):
            ChatTemplate(attack).render(turns)


def copy_of_tiny(folder: Path, **config: Any) -> Path:
    """nld-tiny with other tokenizer_config fields."""
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(fields | config))
    return folder


def test_where_templates_are_found(tmp_path: Path) -> None:
    """The file of its own first, then the JSON files, then ChatML by its tokens."""
    turns = [{"role": "user", "content": "x"}]
    tokenizer = nld_cuda.load("nld-tiny", device="cpu").tokenizer

    def rendered() -> str:
        template = ChatTemplate.from_folder(folder, tokenizer)
        assert template is not None
        return template.render(turns)

    folder = copy_of_tiny(tmp_path)
    assert rendered().startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\nx<|im_end|>")
    assert ChatTemplate.from_folder(folder) is None, "ChatML only where its tokens exist"
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    copy_of_tiny(tmp_path, chat_template=several, bos_token={"content": "<bos>", "lstrip": False})
    assert rendered() == "D"
    copy_of_tiny(tmp_path, chat_template="{{ bos_token }}|{{ messages[0].content }}")
    assert rendered() == "<bos>|x"
    (folder / "chat_template.json").write_text('{"chat_template": "json"}')
    assert rendered() == "json"
    (folder / "chat_template.jinja").write_text("jinja {{ eos_token }}")
    assert rendered() == "jinja <eos>"
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text("[]")
    with pytest.raises(ValueError, match=r"chat_template\.json: must hold a JSON object, got list"):
        rendered()


def ask(chat: Chat, text: str, **options: Any) -> list[int]:
    """The answer's tokens."""
    events = list(chat.ask(text, **options))
    assert events[-1].result is not None
    return events[-1].result.tokens[0]


def test_turns_equal_fresh_calls() -> None:
    """Each answer is what `generate` says to the same ids; modes change on one cache."""
    model = nld_cuda.load("nld-tiny", device="cpu")
    # Keeps all turns as they were said, so that everything is reused.
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    chat = Chat(model, max_new_tokens=20, template=template)
    modes = ["linear_spec", "diffusion", "ar", "quadratic_spec", "linear_spec"]
    for turn, mode in enumerate(modes):
        text = f"sum {turn + 3} 1{turn}"
        extra: dict[str, Any] = {"threshold": 0.9} if mode == "diffusion" else {}
        chat.messages.append({"role": "user", "content": text})
        ids = chat.prompt()
        chat.messages.pop()
        expected = nld_cuda.generate(model, ids, mode, max_new_tokens=20, **extra)
        chat.mode = mode
        assert ask(chat, text, **extra) == expected.tokens[0]
        assert expected.text is not None
        assert [m["role"] for m in chat.messages] == ["user", "assistant"] * (turn + 1)
        if turn:
            assert chat.session.num_reused > 0.5 * len(ids) - 12
    chat.reset()
    assert chat.messages == []
    assert len(ask(chat, "sum 3 10")) > 0
    assert chat.session.num_reused > 0, "the same first words again"


def test_thinking_budget() -> None:
    """Thoughts are ended at the budget; the template is told whether to open one."""
    model = nld_cuda.load("nld-tiny", device="cpu")
    assert model.tokenizer is not None
    end = model.tokenizer.token_id("</think>")
    chat = Chat(model, thinking=True, max_thinking_tokens=3, max_new_tokens=12, eos_token_id=())
    said = ask(chat, "sum 1 2")
    assert said.index(end) <= 3
    content = chat.messages[-1]["content"]
    assert content.startswith("<think>\n") and "</think>" in content
    thought, answer = content.split("</think>")
    prompt = model.tokenizer.decode(chat.prompt(), skip_special_tokens=False)
    assert thought not in prompt and answer.strip() in prompt, "ChatML drops old thoughts"
    chat.thinking = False
    assert end not in ask(chat, "sum 1 2"), "no budget, no thought"
    assert not chat.messages[-1]["content"].startswith("<think>")


def test_a_reader_that_stops() -> None:
    """What was said joins the conversation; what was refused does not."""
    model = nld_cuda.load("nld-tiny", device="cpu")
    chat = Chat(model, mode="ar", max_new_tokens=40, eos_token_id=())
    events = chat.ask("sum 4 5")
    said: list[int] = []
    for event in events:
        said += event.final_tokens
        if len(said) >= 5:
            break
    events.close()
    assert model.tokenizer is not None
    assert chat.messages[-1] == {
        "role": "assistant",
        "content": model.tokenizer.decode(said, skip_special_tokens=False),
    }
    before = list(chat.messages)
    with pytest.raises(ValueError, match="max_new_tokens must be >= 0"):
        chat.ask("more", max_new_tokens=-1)
    assert chat.messages == before


@pytest.fixture(scope="module")
def short_model(tmp_path_factory: pytest.TempPathFactory) -> nld_cuda.NLDModel:
    """Random weights, nld-tiny's tokenizer, room for 96 tokens."""
    folder = tmp_path_factory.mktemp("short")
    fields = config_fields(vocab_size=361, max_position_embeddings=96, num_hidden_layers=2)
    write_checkpoint(folder, fields, random_weights(fields))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    return nld_cuda.load(folder, device="cpu")


def test_interrupted_answers(short_model: nld_cuda.NLDModel) -> None:
    """Ctrl-C leaves what has been said, or nothing; either way the conversation goes on."""
    keep_all = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    chat = Chat(short_model, template=keep_all, max_new_tokens=8, eos_token_id=(), mode="ar")
    assert short_model.tokenizer is not None
    for at in (3, 0):
        before, said = list(chat.messages), []
        with pytest.raises(KeyboardInterrupt):
            for event in chat.ask("hello", ops=Interrupted("verify_", at, late=True)):
                said += event.final_tokens
        content = short_model.tokenizer.decode(said, skip_special_tokens=False)
        turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": content}]
        assert len(said) == at and chat.messages == before + (turns if at else [])
    ids = short_model.tokenizer.encode(f"hello\n{chat.messages[1]['content']}\ngo on\n")
    expected = nld_cuda.generate(short_model, ids[1:], "ar", max_new_tokens=8, eos_token_id=())
    assert ask(chat, "go on") == expected.tokens[0]
    assert chat.session.num_reused >= 5


def test_a_conversation_that_fills_the_model(short_model: nld_cuda.NLDModel) -> None:
    """Answers are cut to what is left; then there is a clear error, and a way on."""
    chat = Chat(short_model, template="{{ messages | map(attribute='content') | join }}")
    chat.options = {"max_new_tokens": 40, "eos_token_id": ()}
    lengths = [len(ask(chat, "ten chars."))]
    with pytest.raises(ValueError, match="prompt and new tokens must fit in 96 places"):
        chat.ask("x", max_new_tokens=97)
    for _ in range(6):
        before = list(chat.messages)
        try:
            lengths.append(len(ask(chat, "ten chars.")))
        except ValueError as error:
            assert "must fit in the model's 96 places with room for an answer, got " in str(error)
            break
    else:
        pytest.fail("never full")
    assert chat.messages == before and lengths[0] == 40 and 0 < lengths[-1] < 40
    chat.reset()
    assert len(ask(chat, "ten chars.")) == 40


def test_a_failed_or_unread_answer_leaves_no_turn(short_model: nld_cuda.NLDModel) -> None:
    chat = Chat(short_model, max_new_tokens=4)
    chat.ask("never read").close()
    with pytest.raises(RuntimeError, match="no memory"):
        list(chat.ask("x", ops=Failing()))
    assert chat.messages == []


class Failing:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("no memory")


def test_what_ends_an_answer(tmp_path: Path) -> None:
    """Every file may name tokens that end a turn."""
    folder = copy_of_tiny(tmp_path, eos_token="</think>")
    model = nld_cuda.load(folder, device="cpu")
    assert model.tokenizer is not None
    marks = [model.tokenizer.token_id(text) for text in ("</think>", "<|im_end|>")]
    assert Chat(model).eos_token_ids == (2, *marks)
    config = folder / "generation_config.json"
    config.write_text('{"eos_token_id": [2, 9], "temperature": 0.6}')
    assert Chat(model).eos_token_ids == (2, 9, *marks)
    config.write_text('{"eos_token_id": 361}')
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must hold token"):
        Chat(model)


def test_chat_errors(tmp_path: Path) -> None:
    model = nld_cuda.load("nld-tiny", device="cpu")
    folder = copy_of_tiny(tmp_path, additional_special_tokens=[])
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(
        text.replace("<|im_start|>", "<|a|>").replace("</think>", "</b>")
    )
    plain = nld_cuda.load(folder, device="cpu")
    with pytest.raises(ValueError, match="model must have a chat template"):
        Chat(plain)
    with pytest.raises(ValueError, match="max_thinking_tokens must be None, the tokenizer has no"):
        Chat(plain, template="x", max_thinking_tokens=4)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="model must have a tokenizer"):
        Chat(nld_cuda.load(folder, device="cpu"))
    with pytest.raises(ValueError, match="must be a Jinja template"):
        Chat(model, template="{% if %}")


def nld_chat(*args: str, said: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nld_cuda", "chat", "--max-new-tokens", "48", *args]
    done = subprocess.run(command, input=said, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


def test_the_command(tmp_path: Path) -> None:
    """Turns in, answers out, one line each; settings change in between; notes on stderr."""
    template = tmp_path / "plain.jinja"
    template.write_text("{{ bos_token }}{{ messages[-1].content }}\n=>\n\n")  # Jinja drops one
    problem = "add 1542+4162"
    lines = [problem, "/stats on", "/mode diffusion", problem, "/mode ar", problem, "", "/help"]
    said = "\n".join([*lines, "/quit", "not read"])
    done = nld_chat("--template", str(template), said=said)
    answer = nld_cuda.generate(
        nld_cuda.load("nld-tiny", device="cpu"), f"{problem}\n=>\n", "ar", max_new_tokens=48
    )
    assert answer.text is not None and answer.text[0].endswith("=05704")
    assert done.stdout == (answer.text[0] + "\n") * 3
    assert "diffusion: " in done.stderr and "ar: " in done.stderr and "reused" in done.stderr
    assert "linear-spec: " not in done.stderr, "figures were off during the first answer"
    assert "/mode NAME" in done.stderr

    done = nld_chat(
        "--system", "S", said="/think 2\na\n/think on\n/system T\n/reset\n/mode x\n/nothing\nb\n"
    )
    assert "unknown command /mode x; /help lists them" in done.stderr
    assert "unknown command /nothing; /help" in done.stderr
    assert done.stdout.count("\n") >= 2


def test_command_errors(tmp_path: Path) -> None:
    done = nld_chat("--template", str(tmp_path / "none"), said="a\n", code=2)
    assert "none" in done.stderr and done.stderr.startswith("nld: error: ")
    done = nld_chat("--max-new-tokens", "4000", said="a\n", code=2)
    assert "prompt and new tokens must fit in 1024 places" in done.stderr


def test_on_a_terminal(
    short_model: nld_cuda.NLDModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Errors and Ctrl-C end an answer, not the conversation; a full model is said to be full."""
    lines: list[str | type[BaseException]] = [
        "a" * 80, "again", "/reset", "stop", "/stats off", KeyboardInterrupt, "go on", "",
        "/mode ar", "b", EOFError,
    ]  # fmt: skip

    def read(_: str) -> str:
        line = lines.pop(0)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    args = build_parser().parse_args(["chat", "--max-new-tokens", "20"])
    console = Console(short_model, args)
    console._is_terminal = console._show_stats = True
    real = console.chat.ask

    def ask(line: str, **options: Any) -> Any:
        return real(
            line, **options, **({"ops": Interrupted("verify_", 1, True)} if line == "stop" else {})
        )

    monkeypatch.setattr(console.chat, "ask", ask)
    console.chat._template = ChatTemplate("{{ messages | map(attribute='content') | join }}")
    assert console.run() == 0
    err = capsys.readouterr().err
    for part in (
        "tokens of the prompt reused",
        "the model's 96 places are full: /reset starts over",
        "chat: the conversation must fit in the model's 96 places",
        "stopped",
        "/quit leaves",
    ):
        assert err.count(part) == 1, part
    assert [m["content"] for m in console.chat.messages[::2]] == ["stop", "go on", "b"]


def run_generate(capsys: pytest.CaptureFixture, *args: str, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "add 1542+4162", "--max-new-tokens", "48", *args])
    assert int(stop.value.code or 0) == code
    out, err = capsys.readouterr()
    return out, err


def test_generate_with_the_template(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One turn of a chat: the same prompt, the same answer, in each way of printing it."""
    model = nld_cuda.load("nld-tiny", device="cpu")
    template = tmp_path / "plain.jinja"
    template.write_text("{{ bos_token }}{{ messages[-1].content }}\n=>\n\n")
    options = ("--chat", "--template", str(template))
    assert json.loads(run_generate(capsys, *options, "--json")[0])["text"].endswith("=05704")
    streamed, err = run_generate(capsys, *options)
    assert streamed.endswith("=05704\n") and err.startswith("linear-spec: ")
    assert run_generate(capsys, *options, "--no-stream")[0] == streamed

    chat = Chat(model, system="S", thinking=True, max_thinking_tokens=3, max_new_tokens=48)
    expected = ask(chat, "add 1542+4162")
    options = ("--chat", "--system", "S", "--max-thinking-tokens", "3")
    out, _ = run_generate(capsys, *options, "--json")
    assert json.loads(out)["tokens"] == expected
    streamed, _ = run_generate(capsys, *options)
    thought = streamed.split("</think>\n")[0]
    assert thought and run_generate(capsys, *options, "--no-stream")[0] == streamed
    out, _ = run_generate(capsys, "--chat", "--no-think", "--json")
    assert json.loads(out)["tokens"] == ask(Chat(model, max_new_tokens=48), "add 1542+4162")

    for args, message in (
        (("--think",), "--think must come with --chat"),
        (("--max-thinking-tokens", "3"), "--max-thinking-tokens must come with --chat"),
        (("--chat", "--no-think", "--max-thinking-tokens", "3"), "must not come with --no-think"),
        (("--chat", "--template", str(tmp_path)), str(tmp_path)),
    ):
        out, err = run_generate(capsys, *args, code=2)
        assert out == "" and err.count("\n") == 1 and message in err


def test_models_without_a_mask_token_decode_in_ar(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    fields = config_fields(vocab_size=361, model_type="ministral3", mask_token_id=None)
    write_checkpoint(tmp_path, fields, random_weights(fields))
    shutil.copy(TINY / "tokenizer.json", tmp_path)
    out, _ = run_generate(capsys, "--model", str(tmp_path), "--json")
    assert json.loads(out)["mode"] == "ar"
    _, err = run_generate(capsys, "--model", str(tmp_path), "--mode", "diffusion", code=2)
    assert "it is made for mode ar" in err
