"""A chat template gives the tokens that the tokenizers library gives, and no message can speak for another."""

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from served import offer, run
from tokenizers import Tokenizer

from tangram.core.chat import Chat, ChatError, chat_of
from tangram.core.interchange import export, import_model
from tangram.core.session import RunError
from tangram.core.tokenizer_files import CONFIG, chat_template
from tangram.core.trained import load_offer
from tangram.plugins.data.bpe import SPECIAL_TOKENS

USER, ASSISTANT = SPECIAL_TOKENS.index("<｜User｜>"), SPECIAL_TOKENS.index("<｜Assistant｜>")
ROLES = st.sampled_from(["system", "user", "assistant"])
PLAIN = st.text(alphabet=st.characters(exclude_characters="<", exclude_categories=["Cs"]), max_size=9)
WICKED = st.lists(
    st.sampled_from([*SPECIAL_TOKENS, "<｜Us", "er｜>", "<", "｜>", "<<｜User｜>", "a", " ", "\ue000"]), max_size=4
).map("".join)


@cache
def library() -> Tokenizer:
    return Tokenizer.from_str(offer().tokenizer.to_json())


def chat() -> Chat:
    found = offer().chat
    assert found is not None
    return found


def messages(contents) -> st.SearchStrategy[list[dict[str, str]]]:
    return st.lists(st.fixed_dictionaries({"role": ROLES, "content": contents}), min_size=1, max_size=4)


@given(messages(PLAIN))
def test_a_conversation_is_the_tokens_that_the_library_makes_of_the_rendered_template(told) -> None:
    said = SPECIAL_TOKENS[0]
    for message in told:
        before, after = {
            "system": ("", ""),
            "user": ("<｜User｜>", ""),
            "assistant": ("<｜Assistant｜>", SPECIAL_TOKENS[1]),
        }[message["role"]]
        said += before + message["content"] + after
    tokenizer = library()
    tokenizer.encode_special_tokens = False  # which in that library means: as themselves
    assert chat().prompt(told) == tokenizer.encode(said + "<｜Assistant｜>", add_special_tokens=False).ids


@example([{"role": "system", "content": "<｜Us"}, {"role": "system", "content": "er｜>a"}])
@given(messages(WICKED))
def test_no_message_holds_a_special_token_whatever_it_says(told) -> None:
    ids, tokenizer = chat().prompt(told), offer().tokenizer
    mute = chat().prompt([{**message, "content": "a"} for message in told])
    special = range(len(SPECIAL_TOKENS))
    assert [i for i in ids if i in special] == [i for i in mute if i in special]
    assert tokenizer.decode(ids) == "".join(message["content"] for message in told)


def test_a_template_beside_the_tokenizer_comes_first_and_a_broken_one_is_told(tmp_path: Path) -> None:
    tokenizer = offer().tokenizer
    told = [{"role": "user", "content": " a "}]
    own = "{%- for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m.content | trim }}]{% endif %}\n{% endfor %}"
    (tmp_path / CONFIG).write_text(json.dumps({"chat_template": own}))
    found = chat_of(tmp_path, tokenizer)
    assert found is not None
    assert tokenizer.decode(found.prompt(told)) == "[a]"
    (tmp_path / CONFIG).write_text(json.dumps({}))
    plain = chat_of(tmp_path, tokenizer)
    assert plain is not None and plain.prompt(told) == chat().prompt(told) and USER in plain.prompt(told)
    for broken in ("{", json.dumps({"chat_template": "{% for"}), "[]"):
        (tmp_path / CONFIG).write_text(broken)
        with pytest.raises(RunError, match=CONFIG):
            chat_of(tmp_path, tokenizer)


def test_an_imported_run_keeps_the_template_that_came_with_its_weights(tmp_path: Path) -> None:
    export(run(), tmp_path / "there")
    written = json.loads((tmp_path / "there" / CONFIG).read_text(encoding="utf-8"))
    assert written["chat_template"] == chat_template(offer().tokenizer)
    (tmp_path / "there" / CONFIG).write_text(json.dumps({**written, "chat_template": "[{{ messages[0].content }}]"}))
    import_model(tmp_path / "there", tmp_path / "back")
    found = load_offer(tmp_path / "back", (), speculate=True)
    assert found.chat is not None
    assert found.tokenizer.decode(found.chat.prompt([{"role": "user", "content": "a"}])) == "[a]"


def test_a_template_may_refuse_and_its_mistakes_are_no_faults_of_ours() -> None:
    tokenizer, told = offer().tokenizer, [{"role": "user", "content": "a"}]
    for template, why in (
        ("{{ raise_exception('no') }}", "no"),
        ("{{ messages[0].x.y }}", "has no attribute"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ):
        with pytest.raises(ChatError, match=why):
            Chat(template, tokenizer).prompt(told)
    with pytest.raises(ChatError, match="private"):
        chat().prompt([{"role": "user", "content": "".join(map(chr, range(0xE000, 0xF900)))}])


def test_a_tokenizer_without_the_tokens_of_a_conversation_has_no_template() -> None:
    description = json.loads(offer().tokenizer.to_json())
    description["added_tokens"] = description["added_tokens"][:6]

    class Few:
        bos, eos = 0, 1

        def to_json(self) -> str:
            return json.dumps(description)

    assert chat_template(Few()) is None
    assert chat_of(run(), Few()) is None
    assert ASSISTANT in chat().prompt([{"role": "user", "content": "a"}])
