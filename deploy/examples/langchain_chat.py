"""Asks any node with LangChain: an answer as it comes, one as an object, and vectors."""

import sys

from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

node = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:7480"


class Place(BaseModel):
    """A place that a question is about."""

    city: str = Field(max_length=30)


model = ChatOpenAI(base_url=f"{node}/v1", api_key="none", model="auto", max_completion_tokens=60)
for chunk in model.stream("Write a function that adds two numbers"):
    print(chunk.text, end="", flush=True)
print()

place = model.with_structured_output(Place, method="json_schema").invoke("Where is the Eiffel Tower?")
print(place)

vectors = OpenAIEmbeddings(
    base_url=f"{node}/v1",
    api_key="none",
    model="auto",
    check_embedding_ctx_length=False,  # else it sends token ids of OpenAI's own vocabulary
)
print(f"{len(vectors.embed_query('a small cut'))} numbers")
