#!/usr/bin/env python3
"""The official Python client with a Lacuna server.

    lacuna serve smollm2-135m-instruct
    pip install openai && python examples/openai_client.py
"""

import json

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8080/v1", api_key="none")
model = client.models.list().data[0].id

# A chat, as it comes.
answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Name three colours."}], max_tokens=64, stream=True)
for chunk in answer:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

# An answer that follows a schema, token by token.
schema = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "country": {"type": "string", "maxLength": 20}},
    "required": ["city", "country"],
    "additionalProperties": False,
}
answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "The capital of France, as JSON."}],
    response_format={"type": "json_schema", "json_schema": {"name": "capital", "schema": schema}},
    temperature=0,
)
print(json.loads(answer.choices[0].message.content))

# A call of a function that must be made.
tool = {"type": "function", "function": {"name": "get_weather", "description": "The weather of a city.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"], "additionalProperties": False}}}
answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "How warm is it in Paris?"}],
    tools=[tool],
    tool_choice="required",
    temperature=0,
)
call = answer.choices[0].message.tool_calls[0]
print(call.function.name, call.function.arguments)

# Texts as vectors. `pooling` is an extension: "mean" or "last"; without it, as the server was started.
vectors = client.embeddings.create(model=model, input=["A cat.", "A kitten.", "The stock market."], extra_body={"pooling": "mean"})
a, b, c = (v.embedding for v in vectors.data)
print("cat and kitten", sum(x * y for x, y in zip(a, b)), "cat and market", sum(x * y for x, y in zip(a, c)))
