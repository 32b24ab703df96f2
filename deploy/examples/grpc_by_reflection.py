"""Asks any node over gRPC with nothing but its address: what it understands, it tells by reflection."""

import sys
from typing import Any

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

node = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:7420"

with grpc.insecure_channel(node) as channel:
    database = ProtoReflectionDescriptorDatabase(channel)
    print("It serves", ", ".join(sorted(database.get_services())))
    service = DescriptorPool(database).FindServiceByName("fieldmesh.v1.InferenceService")
    method = service.FindMethodByName("Chat")
    chat: Any = channel.unary_stream(
        f"/{service.full_name}/{method.name}",
        request_serializer=GetMessageClass(method.input_type).SerializeToString,
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    request: Any = GetMessageClass(method.input_type)()
    request.messages.add(role="user", content="Write a function that adds two numbers")
    request.sampling_params.max_tokens = 60
    for message in chat(request, timeout=60):
        if message.HasField("chunk"):
            print(message.chunk.text, end="", flush=True)
        else:
            print(f"\n— {message.complete.served_by}")
