"""The wire: records of the core to protobuf and back, with every bound checked on the way in."""
