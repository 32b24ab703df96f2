"""Asks any node over gRPC with stubs made from the protocol; needs nothing of Fieldmesh.

    mkdir stubs
    python -m grpc_tools.protoc -I proto --python_out=stubs --grpc_python_out=stubs \\
        proto/fieldmesh/v1/inference.proto
    PYTHONPATH=stubs python grpc_by_stubs.py 127.0.0.1:7420
"""

import sys

import grpc

from fieldmesh.v1 import inference_pb2 as pb
from fieldmesh.v1.inference_pb2_grpc import InferenceServiceStub

node = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:7420"

with grpc.insecure_channel(node) as channel:
    question = pb.ChatMessage(role="user", content="Write a function that adds two numbers")
    request = pb.ChatRequest(messages=[question], sampling_params=pb.SamplingParams(max_tokens=60))
    for message in InferenceServiceStub(channel).Chat(request, timeout=60):
        if message.HasField("chunk"):
            print(message.chunk.text, end="", flush=True)
        else:
            print(f"\n— {message.complete.served_by}")
