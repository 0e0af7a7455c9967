"""What is served is what is generated, whoever is served beside it; and whoever goes away or asks wrongly."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import LENGTH, VOCABULARY, Server, alone, events, offer

from tangram.core.continuation import Request
from tangram.core.sampling import Sampling

ENDLESS = 20_000
"""Tokens that no test waits for."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(batch=4, queue=12) as running:
        yield running


@pytest.fixture(scope="module")
def drafting() -> Iterator[Server]:
    with Server(batch=4, speculate=True) as running:
        yield running


def ids(text: str) -> tuple[int, ...]:
    tokenizer = offer().tokenizer
    return (tokenizer.bos, *tokenizer.encode(text))


def expected(prompt: str, tokens: int, stop: tuple[str, ...] = (), **sampling: float) -> tuple[str, str | None, int]:
    return alone(Request(prompt=ids(prompt), tokens=tokens, sampling=Sampling(**sampling), stop=stop))


def together(server: Server, bodies: list[dict]) -> list[dict]:
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: server.complete(**body), bodies))


PROMPTS = ["a", "naïve café", "世界 🙂", "1: naïve café 世界 🙂 ends 1.", "ends", "0123456789 " * 2]


@pytest.mark.parametrize("served", ["server", "drafting"])
def test_greedy_texts_are_those_that_are_generated_alone_whatever_else_is_in_the_batch(
    served: str, request: pytest.FixtureRequest
) -> None:
    bodies = [{"prompt": prompt, "max_tokens": 5 + 4 * i} for i, prompt in enumerate(PROMPTS)]
    drawn = [{"prompt": prompt, "max_tokens": 9, "temperature": 1.5, "seed": i} for i, prompt in enumerate(PROMPTS)]
    answers = together(
        request.getfixturevalue(served), [body for pair in zip(bodies, drawn, strict=True) for body in pair]
    )
    for body, answer in zip(bodies, answers[::2], strict=True):
        text, reason, count = expected(body["prompt"], body["max_tokens"])
        choice = answer["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (text, reason)
        prompt_tokens = len(ids(body["prompt"]))
        assert answer["usage"] == {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": count,
            "total_tokens": prompt_tokens + count,
        }


def test_a_seed_decides_a_text_and_the_next_ones_those_of_further_choices(server: Server) -> None:
    how = {"temperature": 5.0, "top_k": 200, "min_p": 0.001}
    body = {"prompt": PROMPTS[:2], "n": 3, "max_tokens": 40, "seed": 11, **how}
    answers = together(server, [body, body])
    assert answers[0]["choices"] == answers[1]["choices"]
    reasons = set()
    for i, choice in enumerate(answers[0]["choices"]):
        text, reason, _ = expected(PROMPTS[i // 3], 40, seed=11 + i, **how)
        assert (choice["index"], choice["text"], choice["finish_reason"]) == (i, text, reason)
        reasons.add(reason)
    assert reasons == {"stop", "length"}  # some ended by the end of the document
    without = [server.complete("a", max_tokens=20, temperature=5.0)["choices"][0]["text"] for _ in range(3)]
    assert len(set(without)) == 3


def test_a_text_ends_before_a_stop_string_and_its_place_is_free_again(server: Server) -> None:
    whole = expected("ends", 40)[0]
    for stop in (whole[9:12], whole[20:21], whole[:1]):
        choice = server.complete("ends", max_tokens=40, stop=[stop, "never comes"])["choices"][0]
        assert choice["text"] == whole[: whole.index(stop)]
        assert choice["finish_reason"] == "stop"
    assert idle(server)["tangram_cache_bytes"] == 0


def test_token_ids_are_a_prompt_as_they_are(server: Server) -> None:
    for prompt in (list(ids("café")), [list(ids("café"))]):
        assert server.complete(prompt, max_tokens=9)["choices"][0]["text"] == expected("café", 9)[0]


@pytest.mark.parametrize("stop", [(), ("é", "🙂", "ab")])
def test_the_pieces_of_a_stream_are_the_whole_text(server: Server, stop: tuple[str, ...]) -> None:
    fields = {"max_tokens": 30, "n": 2, "stop": list(stop), "temperature": 2.0, "seed": 4, "echo": True}
    whole = server.complete("naïve", **fields)
    with server.stream("naïve", stream_options={"include_usage": True}, **fields) as pieces:
        told = list(pieces)
    for wanted in whole["choices"]:
        own = [c for event in told for c in event["choices"] if c["index"] == wanted["index"]]
        assert "".join(c["text"] for c in own) == wanted["text"]
        assert wanted["text"].startswith("naïve")
        assert [c["finish_reason"] for c in own[-2:]] == [None, wanted["finish_reason"]]
    assert told[-1]["usage"] == whole["usage"] and told[-1]["choices"] == []
    assert all(event["usage"] is None and event["choices"] for event in told[:-1])


def test_a_chat_continues_the_prompt_that_the_template_makes(server: Server) -> None:
    messages = [
        {"role": "system", "content": "ends"},
        {"role": "user", "content": [{"type": "text", "text": "na"}, {"type": "text", "text": "ïve"}]},
    ]
    assert offer().chat is not None
    flat = [messages[0], {"role": "user", "content": "naïve"}]
    prompt = tuple(offer().chat.prompt(flat))
    text, reason, count = alone(Request(prompt=prompt, tokens=LENGTH - len(prompt)))
    body = {"messages": messages, "temperature": 0}
    answer = server.client.post("/v1/chat/completions", json=body).json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": text}
    assert answer["choices"][0]["finish_reason"] == reason
    assert answer["usage"]["completion_tokens"] == count
    with server.client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as streamed:
        deltas = [event["choices"][0]["delta"] for event in events(streamed)]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == text


def test_drafts_are_counted_by_depth_and_change_no_greedy_text(drafting: Server) -> None:
    before = drafting.metrics()
    assert drafting.complete("ends", max_tokens=40)["choices"][0]["text"] == expected("ends", 40)[0]
    after = drafting.metrics()
    offered, accepted, rounds, tokens = (
        after[name] - before.get(name, 0)
        for name in (
            'tangram_drafts_offered_total{depth="1"}',
            'tangram_drafts_accepted_total{depth="1"}',
            "tangram_rounds_total",
            "tangram_tokens_total",
        )
    )
    assert 0 <= accepted <= offered == rounds - 1  # the first round reads the prompt
    assert tokens == 40 <= rounds + accepted <= 41  # a last draft may be beyond the text


# --- who goes away, and who has no room ---------------------------------------------------------------------------


def idle(server: Server) -> dict[str, float]:
    """Return the metrics once nothing runs; sooner or later everything ends."""
    while True:
        found = server.metrics()
        if not found["tangram_running"] + found["tangram_waiting"]:
            return found


@pytest.fixture(scope="module")
def narrow() -> Iterator[Server]:
    with Server(batch=1, queue=1, context=ENDLESS) as running:
        yield running


def test_a_client_that_goes_away_frees_its_row_and_its_blocks(narrow: Server) -> None:
    before = narrow.metrics()
    with narrow.stream("a", max_tokens=ENDLESS - 9) as pieces:
        next(pieces)
        assert narrow.metrics()["tangram_running"] == 1
    with pytest.raises(httpx.ReadTimeout):
        narrow.ask("a", patience=0.05, max_tokens=ENDLESS - 9)
    after = idle(narrow)
    assert after["tangram_cancelled_total"] - before["tangram_cancelled_total"] == 2
    assert after["tangram_tokens_total"] - before["tangram_tokens_total"] < ENDLESS
    narrow.complete("a", max_tokens=1)  # what the worker says after it tells of the cache
    assert idle(narrow)["tangram_cache_bytes"] == 0


def test_a_full_queue_refuses_and_who_leaves_it_makes_room(narrow: Server) -> None:
    idle(narrow)
    with narrow.stream("a", max_tokens=ENDLESS - 9) as running:
        next(running)
        with narrow.stream("b", max_tokens=9):
            refused = narrow.ask("c")
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert narrow.metrics()["tangram_waiting"] == 1
        while narrow.metrics()["tangram_waiting"]:
            pass
        with narrow.stream("d", max_tokens=9):
            assert narrow.metrics()["tangram_waiting"] == 1
    assert idle(narrow)['tangram_requests_total{status="429"}'] == 1
    many = narrow.ask("c", n=3)
    assert many.status_code == 400 and many.json()["error"]["param"] == "n"  # more than there could ever be room for


def test_told_to_stop_it_finishes_what_runs_and_takes_nothing_new() -> None:
    with Server(batch=1, context=400) as server, server.stream("a", max_tokens=360) as pieces:
        said = next(pieces)["choices"][0]["text"]
        server.stop()
        while server.client.get("/health").status_code == 200:
            pass
        refused = server.ask("b")
        assert refused.status_code == 503 and refused.json()["error"]["type"] == "server_error"
        rest = list(pieces)
    assert server.code == 0
    assert said + "".join(event["choices"][0]["text"] for event in rest) == expected("a", 360)[0]


def test_a_request_has_only_so_much_time() -> None:
    with Server(batch=2, context=ENDLESS, seconds=0.3) as server:
        late = server.ask("a", max_tokens=ENDLESS - 9)
        assert late.status_code == 504 and late.json()["error"]["type"] == "server_error"
        with server.stream("a", max_tokens=ENDLESS - 9) as pieces:
            *_, last = pieces
        assert "more time" in last["error"]["message"]
        assert server.complete("b", max_tokens=2)["usage"]["completion_tokens"] == 2


# --- who asks wrongly ---------------------------------------------------------------------------------------------

WRONG = [
    ({}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 3]}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"prompt": [0, VOCABULARY]}, "prompt"),
    ({"prompt": [0, -1]}, "prompt"),
    ({"prompt": [True, False]}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"prompt": "a " * LENGTH}, "prompt"),
    ({"prompt": "a", "max_tokens": LENGTH}, "prompt"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 1.0}, "max_tokens"),
    ({"prompt": "a", "max_tokens": "1"}, "max_tokens"),
    ({"prompt": "a", "temperature": -0.1}, "temperature"),
    ({"prompt": "a", "temperature": 1e-310}, "temperature"),
    ({"prompt": "a", "temperature": 10**400}, "temperature"),
    ({"prompt": "a", "temperature": True}, "temperature"),
    ({"prompt": "a", "top_p": 0}, "top_p"),
    ({"prompt": "a", "top_k": -1}, "top_k"),
    ({"prompt": "a", "min_p": 1.5}, "min_p"),
    ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
    ({"prompt": "a", "seed": 1 << 63}, "seed"),
    ({"prompt": "a", "stop": ""}, "stop"),
    ({"prompt": "a", "stop": ["a"] * 17}, "stop"),
    ({"prompt": "a", "stop": "a" * 257}, "stop"),
    ({"prompt": "a", "stop": [1]}, "stop"),
    ({"prompt": "a", "n": 0}, "n"),
    ({"prompt": ["a", "b"], "n": 9}, "n"),
    ({"prompt": "a", "stream": 1}, "stream"),
    ({"prompt": "a", "stream_options": {}}, "stream_options"),
    ({"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "stream_options"),
    ({"prompt": "a", "logprobs": 1}, "logprobs"),
    ({"prompt": "a", "best_of": True}, "best_of"),
    ({"prompt": "a", "tools": [{}]}, "tools"),
    ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty"),
    ({"prompt": "a", "max_token": 3}, "max_token"),
    ({"prompt": "a", "messages": []}, "messages"),
    ({"prompt": "a", "model": "other"}, "model"),
    ({"prompt": "a", "model": 3}, "model"),
]
WRONG_CHATS = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "a"}, "messages"),
    ({"messages": ["a"]}, "messages.0"),
    ({"messages": [{"role": "user"}]}, "messages.0"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": None}]}, "messages.1.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "\udfff"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
    ({"messages": [{"role": "user", "content": "a " * LENGTH}]}, "messages"),
    ({"messages": [{"role": "user", "content": "a"}], "echo": True}, "echo"),
]


def post(server: Server, path: str, body: dict) -> httpx.Response:
    """Send a body in ASCII, whatever is in it."""
    kind = {"content-type": "application/json"}
    return server.client.post(f"/v1/{path}", content=json.dumps(body), headers=kind)


def refused(answer: httpx.Response, status: int) -> dict:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.mark.parametrize(("path", "wrong"), [("completions", WRONG), ("chat/completions", WRONG_CHATS)])
def test_a_bad_request_is_refused_with_a_reason_that_names_the_field(server, path, wrong) -> None:
    for body, param in wrong:
        answer = post(server, path, body)
        error = refused(answer, 404 if body.get("model") == "other" else 400)
        assert error["param"] == param, (body, error)
        assert param.partition(".")[0] in error["message"] or param == "prompt", (body, error)


def test_fields_that_ask_for_nothing_are_taken(server: Server) -> None:
    nothing = {"logprobs": None, "best_of": 1, "presence_penalty": 0.0, "logit_bias": {}, "suffix": None, "tools": []}
    plain = server.complete("a", max_tokens=4)["choices"]
    assert server.complete("a", max_tokens=4, model="small", user=None, **nothing)["choices"] == plain


def test_what_is_no_request_is_refused(server: Server) -> None:
    send, path = server.client.post, "/v1/completions"
    kind = {"content-type": "application/json"}
    for body in (b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"prompt": NaN}', b"[" * 100_000, b"1" * 5000):
        refused(send(path, content=body, headers=kind), 400)
    refused(send(path, content=b'{"prompt": "' + b"a" * (1 << 20) + b'"}', headers=kind), 413)
    refused(send(path, content=b'{"prompt": "a"}', headers={"content-type": "text/plain"}), 415)
    refused(server.client.get(path), 405)
    refused(server.client.get("/v2"), 404)
    listed = server.client.get("/v1/models").json()["data"]
    assert [entry["id"] for entry in listed] == ["small"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 1 << 70) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted({name for body, _ in WRONG + WRONG_CHATS for name in body} | {"echo", "max_completion_tokens"})
SANE = st.sampled_from(["a", ["a", "b"], [0, 5], 1, 2, 0.5, True, False, None, [{"role": "user", "content": "a"}]])


@settings(max_examples=60)
@given(
    path=st.sampled_from(["completions", "chat/completions"]),
    fields=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=9), SANE | JSON, max_size=6),
    begin=st.booleans(),
)
def test_whatever_is_asked_is_answered_or_refused_and_never_a_fault(server, path, fields, begin) -> None:
    sane = {"prompt": "a"} if path == "completions" else {"messages": [{"role": "user", "content": "a"}]}
    answer = post(server, path, {**sane, **fields} if begin else fields)
    if answer.status_code != 200:
        assert answer.status_code in (400, 404)
        refused(answer, answer.status_code)
