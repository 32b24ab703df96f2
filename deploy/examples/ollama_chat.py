"""Asks any node with Ollama's library."""

import sys

from ollama import Client

node = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:7480"

mesh = Client(host=node)
print("There is", ", ".join(model.model or "" for model in mesh.list().models))
question = {"role": "user", "content": "Write a function that adds two numbers"}
for part in mesh.chat("auto", [question], stream=True, options={"num_predict": 60}):
    print(part.message.content or "", end="", flush=True)
print()
