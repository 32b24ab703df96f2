# Asks any node over gRPC from Ruby, with Debian's packages alone (ruby-grpc, ruby-grpc-tools):
#
#   mkdir stubs
#   grpc_tools_ruby_protoc -I proto --ruby_out=stubs --grpc_out=stubs proto/fieldmesh/v1/inference.proto
#   ruby -I stubs grpc_chat.rb 127.0.0.1:7420
require 'fieldmesh/v1/inference_services_pb'

node = ARGV.fetch(0, '127.0.0.1:7420')
mesh = Fieldmesh::V1::InferenceService::Stub.new(node, :this_channel_is_insecure)
request = Fieldmesh::V1::ChatRequest.new(
  messages: [Fieldmesh::V1::ChatMessage.new(role: 'user', content: 'Write a function that adds two numbers')],
  sampling_params: Fieldmesh::V1::SamplingParams.new(max_tokens: 60)
)
mesh.chat(request, deadline: Time.now + 60).each do |message|
  if message.response == :chunk
    print message.chunk.text
  else
    puts "\n— #{message.complete.served_by}"
  end
end
