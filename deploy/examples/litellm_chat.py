"""Asks any node with litellm. Another model of its list may be the fallback where no node answers."""

import sys

import litellm

node = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:7480"

stream = litellm.completion(
    model="openai/auto",  # or "ollama_chat/auto" with api_base=node
    api_base=f"{node}/v1",
    api_key="none",
    messages=[{"role": "user", "content": "Write a function that adds two numbers"}],
    max_tokens=60,
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
