#!/usr/bin/env python3
"""The official `openai` client against a running server: what applications will do.

    lacuna serve smollm2-135m-instruct
    python tests/serve/openai_suite.py --base-url http://127.0.0.1:8080/v1

Prints a line for each test and exits with 1 if one failed. `--list` names the tests, `--only NAME` runs one. `cargo test --test openai` does all of
that by itself where the package is installed.
"""

import argparse
import base64
import json
import math
import struct
import sys
import threading
import time
import traceback
import urllib.request

TESTS = []
USER = [{"role": "user", "content": "Name three colours."}]


def test(f):
    TESTS.append(f)
    return f


class Run:
    def __init__(self, base_url, key):
        import openai

        self.openai = openai
        self.base_url = base_url
        self.client = openai.OpenAI(base_url=base_url, api_key=key or "none", max_retries=0, timeout=300)
        self.model = self.client.models.list().data[0].id

    def chat(self, messages=USER, **more):
        settings = {"max_tokens": 24, "temperature": 0, **more}
        return self.client.chat.completions.create(model=self.model, messages=messages, **settings)

    def live(self):
        request = urllib.request.Request(self.base_url.removesuffix("/v1") + "/api/live")
        request.add_header("Authorization", f"Bearer {self.client.api_key}")
        return json.load(urllib.request.urlopen(request, timeout=30))

    def quiet(self, seconds=20):
        end = time.time() + seconds
        while self.live()["running"] or self.live()["waiting"]:
            assert time.time() < end, f"still at work: {self.live()}"
            time.sleep(0.05)

    def refused(self, kind, f, **expected):
        try:
            f()
        except kind as e:
            for name, value in expected.items():
                assert getattr(e, name) == value, f"{name} is {getattr(e, name)!r}, not {value!r}: {e}"
            return e
        raise AssertionError(f"{kind.__name__} was expected")


@test
def models(r):
    assert r.client.models.retrieve(r.model).id == r.model
    r.refused(r.openai.NotFoundError, lambda: r.client.models.retrieve("no-such-model"), code="model_not_found")


@test
def chat(r):
    a = r.chat()
    assert a.choices[0].message.role == "assistant" and a.choices[0].message.content
    assert a.choices[0].finish_reason in ("stop", "length")
    assert a.usage.total_tokens == a.usage.prompt_tokens + a.usage.completion_tokens
    assert a.usage.completion_tokens <= 24
    assert r.chat().choices[0].message.content == a.choices[0].message.content, "greedy twice"
    assert r.chat().usage.prompt_tokens_details.cached_tokens > 0 or a.usage.prompt_tokens <= 32


@test
def chat_with_parts_and_roles(r):
    parts = [{"role": "developer", "content": "Be short."}, {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": " there"}]}]
    whole = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello there"}]
    assert r.chat(parts).choices[0].message.content == r.chat(whole).choices[0].message.content


@test
def stream(r):
    whole = r.chat()
    pieces, reasons, usage = [], [], None
    for chunk in r.chat(stream=True, stream_options={"include_usage": True}):
        if chunk.usage:
            usage = chunk.usage
            assert chunk.choices == []
            continue
        pieces.append(chunk.choices[0].delta.content or "")
        reasons.append(chunk.choices[0].finish_reason)
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 3 and reasons[-1] == whole.choices[0].finish_reason and not any(reasons[:-1])
    assert usage.completion_tokens == whole.usage.completion_tokens


@test
def stream_helper(r):
    with r.client.chat.completions.stream(model=r.model, messages=USER, max_tokens=12, temperature=0) as events:
        kinds = [e.type for e in events]
        # get_final_completion refuses answers cut by their length.
        final = events.current_completion_snapshot
    assert "content.delta" in kinds and final.choices[0].message.content


@test
def together_as_alone(r):
    words = ["red", "green", "blue", "a long story about rivers and mountains", "numbers", "music"]
    ask = lambda w: r.chat([{"role": "user", "content": f"Tell me about {w}."}], max_tokens=32).choices[0].message.content
    alone = {w: ask(w) for w in words}
    got = {}
    threads = [threading.Thread(target=lambda w=w: got.__setitem__(w, ask(w))) for w in words]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert got == alone


@test
def seed_and_n(r):
    draw = lambda **more: [c.message.content for c in r.chat(temperature=1, max_tokens=16, **more).choices]
    assert draw(seed=5, n=3) == draw(seed=5, n=3)
    assert draw(seed=5, n=3)[1:] == draw(seed=6, n=2)
    assert len(set(draw(seed=5, n=3))) > 1


@test
def stop_and_length(r):
    text = r.chat().choices[0].message.content
    word = text.split()[3]
    cut = r.chat(stop=[word, "zzzz"]).choices[0]
    assert cut.finish_reason == "stop" and cut.message.content == text[: text.index(word)]
    short = r.client.chat.completions.create(model=r.model, messages=USER, max_completion_tokens=3, temperature=0)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 3


@test
def logprobs(r):
    a = r.chat(logprobs=True, top_logprobs=4).choices[0]
    assert "".join(t.token for t in a.logprobs.content) == a.message.content
    for t in a.logprobs.content:
        assert t.logprob <= 0 and len(t.top_logprobs) == 4 and t.top_logprobs[0].token == t.token
        assert bytes(t.bytes).decode("utf-8", "replace") == t.token
        assert sum(math.exp(x.logprob) for x in t.top_logprobs) <= 1.0001
    old = r.client.completions.create(model=r.model, prompt="One, two,", max_tokens=5, temperature=0, logprobs=2).choices[0]
    assert len(old.logprobs.tokens) == 5 and old.logprobs.text_offset[0] == 0 and len(old.logprobs.top_logprobs[0]) == 2


@test
def penalties_and_bias(r):
    first = r.chat(logprobs=True, top_logprobs=1, max_tokens=4).choices[0].message.content
    assert first
    a = r.chat(frequency_penalty=2, presence_penalty=2, max_tokens=32).choices[0].message.content
    assert a != r.chat(max_tokens=32).choices[0].message.content
    only = r.client.completions.create(model=r.model, prompt="x", max_tokens=3, temperature=0, logit_bias={"40": 100})
    assert len(set(only.choices[0].text)) <= len(only.choices[0].text) // 2 + 1


@test
def completions(r):
    a = r.client.completions.create(model=r.model, prompt=["The sky is", "Water is"], max_tokens=8, temperature=0)
    assert [c.index for c in a.choices] == [0, 1] and all(c.text for c in a.choices)
    pieces = r.client.completions.create(model=r.model, prompt="The sky is", max_tokens=8, temperature=0, stream=True)
    assert "".join(p.choices[0].text for p in pieces) == a.choices[0].text


@test
def echo(r):
    ask = lambda **more: r.client.completions.create(model=r.model, prompt=["One, two, three,", "The sky"], temperature=0, echo=True, logprobs=1, **more)
    read = ask(max_tokens=0).choices
    assert [c.text for c in read] == ["One, two, three,", "The sky"]
    for c in read:
        l = c.logprobs
        assert l.token_logprobs[0] is None and all(p <= 0 for p in l.token_logprobs[1:]) and l.top_logprobs[0] is None
        assert all(c.text[at:].startswith(t) for t, at in zip(l.tokens, l.text_offset)) and "".join(l.tokens) == c.text
    more = ask(max_tokens=4).choices
    for a, b in zip(read, more):
        n = len(a.logprobs.tokens)
        assert b.text.startswith(a.text) and b.logprobs.token_logprobs[:n] == a.logprobs.token_logprobs


@test
def responses(r):
    settings = dict(model=r.model, temperature=0, max_output_tokens=24, store=False)
    a = r.client.responses.create(input="Name three colours.", **settings)
    assert a.output_text == r.chat().choices[0].message.content and a.usage.output_tokens <= 24
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "Name three colours."}]}]
    assert r.client.responses.create(input=parts, **settings).output_text == a.output_text
    text, kinds = "", []
    for event in r.client.responses.create(input="Name three colours.", stream=True, **settings):
        kinds.append(event.type)
        text += event.delta if event.type == "response.output_text.delta" else ""
    assert text == a.output_text and kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")
    more = [{"role": "user", "content": "Name three colours."}, *a.output, {"role": "user", "content": "And three more."}]
    assert r.client.responses.create(input=more, **settings).output_text
    tool = {"type": "function", **WEATHER["function"], "strict": True}
    called = r.client.responses.create(model=r.model, input="How warm is it in Paris?", tools=[tool], tool_choice="required", max_output_tokens=120).output[0]
    assert called.type == "function_call" and set(json.loads(called.arguments)) == {"city", "unit"}
    back = [{"role": "user", "content": "How warm is it in Paris?"}, called, {"type": "function_call_output", "call_id": called.call_id, "output": "21 degrees"}]
    assert r.client.responses.create(input=back, **settings).output_text
    with r.client.responses.stream(input="Name three colours.", model=r.model, temperature=0, max_output_tokens=24) as events:
        for _ in events:
            pass


@test
def json_object(r):
    a = r.chat([{"role": "user", "content": "A cat as a JSON object."}], response_format={"type": "json_object"}, max_tokens=200, temperature=0.7, seed=1)
    text = a.choices[0].message.content
    assert text.startswith("{")
    if a.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@test
def json_schema(r):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "legs": {"type": "integer", "minimum": 0, "maximum": 8}, "kind": {"enum": ["bird", "fish", "cat"]}},
        "required": ["name", "legs", "kind"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema, "strict": True}}
    for seed in range(4):
        a = r.chat([{"role": "user", "content": "Describe an animal."}], response_format=form, max_tokens=200, temperature=1, seed=seed)
        v = json.loads(a.choices[0].message.content)
        assert set(v) == {"name", "legs", "kind"} and 0 <= v["legs"] <= 8 and v["kind"] in ("bird", "fish", "cat"), v
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    r.refused(r.openai.BadRequestError, lambda: r.chat(response_format=bad), param="response_format")


@test
def parsed(r):
    from pydantic import BaseModel

    class Step(BaseModel):
        number: int
        done: bool

    a = r.client.chat.completions.parse(model=r.model, messages=USER, response_format=Step, max_tokens=60, temperature=0)
    assert isinstance(a.choices[0].message.parsed, Step)


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 30}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


@test
def tools(r):
    ask = [{"role": "user", "content": "How warm is it in Paris?"}]
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        a = r.chat(ask, tools=[WEATHER], tool_choice=choice, max_tokens=120)
        assert a.choices[0].finish_reason == "tool_calls" and a.choices[0].message.content is None
        call = a.choices[0].message.tool_calls[0]
        v = json.loads(call.function.arguments)
        assert call.function.name == "get_weather" and set(v) == {"city", "unit"} and v["unit"] in ("C", "F")
    back = ask + [a.choices[0].message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}]
    assert r.chat(back).choices[0].message.content
    name, arguments = None, ""
    for chunk in r.chat(ask, tools=[WEATHER], tool_choice="required", max_tokens=120, stream=True):
        for piece in chunk.choices[0].delta.tool_calls or []:
            name = piece.function.name or name
            arguments += piece.function.arguments or ""
    assert name == "get_weather" and set(json.loads(arguments)) == {"city", "unit"}


def sent_back(message):
    """A message as applications keep it: the object itself, and all that it can be made into."""
    return [message, message.model_dump(), message.model_dump(exclude_none=True), message.model_dump(exclude_unset=True), message.to_dict()]


@test
def round_trip(r):
    first = r.chat().choices[0].message
    more = lambda m: r.chat(USER + [m, {"role": "user", "content": "And three more."}]).choices[0].message.content
    plain = more({"role": "assistant", "content": first.content})
    assert plain
    for m in sent_back(first):
        assert more(m) == plain, m
    with r.client.chat.completions.stream(model=r.model, messages=USER, max_tokens=24, temperature=0) as events:
        for _ in events:
            pass
        streamed = events.current_completion_snapshot.choices[0].message
    for m in sent_back(streamed):
        assert more(m) == plain, m


@test
def round_trip_of_calls(r):
    ask = [{"role": "user", "content": "How warm is it in Paris?"}]
    settings = dict(tools=[WEATHER], tool_choice="required", max_tokens=120)
    call = r.chat(ask, **settings).choices[0].message
    assert call.content is None and call.model_dump()["function_call"] is None
    parsed = r.client.chat.completions.parse(model=r.model, messages=ask, temperature=0, **{**settings, "tools": [{**WEATHER, "function": {**WEATHER["function"], "strict": True}}]}).choices[0].message
    assert parsed.tool_calls[0].function.parsed_arguments
    with r.client.chat.completions.stream(model=r.model, messages=ask, temperature=0, **settings) as events:
        streamed = events.get_final_completion().choices[0].message
    assert "index" in streamed.model_dump()["tool_calls"][0]
    told = lambda m: r.chat(ask + [m, {"role": "tool", "tool_call_id": "x", "content": "21 degrees"}]).choices[0].message.content
    plain = told({"role": "assistant", "content": None, "tool_calls": [call.tool_calls[0].to_dict()]})
    assert plain
    for m in sent_back(call) + sent_back(parsed) + sent_back(streamed):
        assert told(m) == plain, m


@test
def null_is_nothing(r):
    import typing

    from openai.types import completion_create_params, embedding_create_params
    from openai.types.chat import completion_create_params as chat_params

    def optional(*kinds):
        names = set()
        for kind in kinds:
            names |= set(typing.get_type_hints(kind))
        return names

    # Whatever the client knows, set to null.
    fields = optional(chat_params.CompletionCreateParamsNonStreaming) - {"model", "messages", "max_tokens", "temperature"}
    assert len(fields) > 25
    plain = r.chat().choices[0].message.content
    assert r.chat(extra_body=dict.fromkeys(fields)).choices[0].message.content == plain
    fields = optional(completion_create_params.CompletionCreateParamsNonStreaming) - {"model", "prompt", "max_tokens", "temperature"}
    text = lambda **more: r.client.completions.create(model=r.model, prompt="The sky is", max_tokens=8, temperature=0, **more).choices[0].text
    assert text(extra_body=dict.fromkeys(fields)) == text()
    fields = optional(embedding_create_params.EmbeddingCreateParams) - {"model", "input"}
    vector = lambda **more: r.client.embeddings.create(model=r.model, input="x", encoding_format="float", **more).data[0].embedding
    assert vector(extra_body=dict.fromkeys(fields)) == vector()


@test
def what_is_done_anyway(r):
    plain = r.chat().choices[0].message.content
    for more in (
        dict(store=False, metadata={}, modalities=["text"], service_tier="auto", verbosity="medium"),
        dict(tool_choice="auto", parallel_tool_calls=True, tools=[], logprobs=False, top_logprobs=0),
        dict(prompt_cache_key="k", safety_identifier="s", user="u", stream_options={"include_usage": False}),
    ):
        assert r.chat(**more).choices[0].message.content == plain, more
    text = lambda **more: r.client.completions.create(model=r.model, prompt="The sky is", max_tokens=8, temperature=0, **more).choices[0].text
    assert text(best_of=1, echo=False, suffix="") == text()
    width = len(r.client.embeddings.create(model=r.model, input="x").data[0].embedding)
    assert len(r.client.embeddings.create(model=r.model, input="x", dimensions=width).data[0].embedding) == width


@test
def numbers(r):
    form = lambda n: {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"id": {"const": n}}, "required": ["id"], "additionalProperties": False}}}
    a = r.chat(response_format=form(2**60), max_tokens=60).choices[0].message.content
    assert json.loads(a) == {"id": 2**60}
    for n in (1234567890123456789, 10**30 + 1):
        r.refused(r.openai.BadRequestError, lambda: r.chat(response_format=form(n)), param="response_format.json_schema.schema.properties.id.const")


@test
def embeddings(r):
    texts = ["The cat sat on the mat.", "A cat was sitting on a mat.", "Interest rates rose by two points."]
    for pooling in ("mean", "last"):
        # The client asks for base64 by itself.
        a = r.client.embeddings.create(model=r.model, input=texts, extra_body={"pooling": pooling})
        vectors = [d.embedding for d in a.data]
        assert [d.index for d in a.data] == [0, 1, 2] and a.usage.prompt_tokens > 10
        assert all(abs(sum(x * x for x in v) - 1) < 1e-3 for v in vectors)
        plain = r.client.embeddings.create(model=r.model, input=texts, encoding_format="float", extra_body={"pooling": pooling})
        assert all(abs(x - y) < 1e-6 for x, y in zip(plain.data[0].embedding, vectors[0]))
        dot = lambda a, b: sum(x * y for x, y in zip(a, b))
        if pooling == "mean":
            assert dot(vectors[0], vectors[1]) > dot(vectors[0], vectors[2])
    raw = r.client.embeddings.with_raw_response.create(model=r.model, input="x", encoding_format="base64")
    coded = json.loads(raw.text)["data"][0]["embedding"]
    assert len(struct.unpack(f"<{len(base64.b64decode(coded)) // 4}f", base64.b64decode(coded))) == len(vectors[0])


@test
def errors(r):
    bad = r.openai.BadRequestError
    r.refused(r.openai.NotFoundError, lambda: r.client.chat.completions.create(model="gpt-4", messages=USER), code="model_not_found", param="model")
    r.refused(bad, lambda: r.chat(temperature=3), param="temperature", code="invalid_value")
    r.refused(bad, lambda: r.chat(extra_body={"frobnicate": 1}), param="frobnicate", code="unknown_parameter")
    r.refused(bad, lambda: r.chat(store=True), param="store", code="unsupported_parameter")
    r.refused(bad, lambda: r.chat([]), param="messages")
    r.refused(bad, lambda: r.chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]), param="messages.0.content.0.type")
    r.refused(bad, lambda: r.chat([{"role": "user", "content": "word " * 40000}]), code="context_length_exceeded")
    r.refused(bad, lambda: r.chat(max_tokens=10_000_000), param="max_tokens")
    r.refused(bad, lambda: r.client.responses.create(model=r.model, input="x", store=True), param="store")
    r.refused(bad, lambda: r.client.embeddings.create(model=r.model, input="x", dimensions=4), param="dimensions")
    big = [{"role": "user", "content": "x" * (5 << 20)}]
    e = r.refused(r.openai.APIStatusError, lambda: r.chat(big))
    assert e.status_code == 413


@test
def cancellation(r):
    r.quiet()
    before = r.live()["generated_tokens"]
    got = 0
    answer = r.chat([{"role": "user", "content": "Write a very long story."}], max_tokens=1500, logit_bias={}, stream=True)
    for chunk in answer:
        got += 1
        if got == 5:
            break
    answer.close()
    r.quiet(10)
    assert r.live()["kv"]["used"] == 0 and got == 5
    assert r.live()["generated_tokens"] <= before + 1500
    impatient = r.client.with_options(timeout=0.3)
    r.refused(r.openai.APITimeoutError, lambda: impatient.chat.completions.create(model=r.model, messages=USER, max_tokens=1500, logit_bias={"2": -100}))
    r.quiet(10)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base-url", default="http://127.0.0.1:8080/v1")
    p.add_argument("--key")
    p.add_argument("--list", action="store_true")
    p.add_argument("--only", metavar="NAME")
    a = p.parse_args()
    if a.list:
        print("\n".join(f.__name__ for f in TESTS))
        return 0
    r = Run(a.base_url, a.key)
    failed = 0
    for f in TESTS:
        if a.only and f.__name__ != a.only:
            continue
        try:
            f(r)
            print(f"ok      {f.__name__}")
        except Exception:
            failed += 1
            print(f"FAILED  {f.__name__}\n{traceback.format_exc()}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
