"""Asks any node with OpenAI's library, and says who answered."""

import sys

from openai import OpenAI

node = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:7480"

with OpenAI(base_url=f"{node}/v1", api_key="none") as mesh:
    stream = mesh.chat.completions.create(
        model="auto",
        messages=[{"role": "user", "content": "Write a function that adds two numbers"}],
        max_tokens=60,
        stream=True,
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print(f"\n— {stream.response.headers['x-fieldmesh-served-by']}")
