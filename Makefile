PY ?= .venv/bin/python

.PHONY: proto
proto: ## regenerate the stubs from proto/
	$(PY) -m grpc_tools.protoc -I proto --python_out=node --grpc_python_out=node --mypy_out=quiet:node --mypy_grpc_out=quiet:node proto/fieldmesh/v1/*.proto
