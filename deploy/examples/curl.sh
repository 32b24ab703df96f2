#!/bin/sh
# Asks any node with curl: the answer as it comes, then as one document.
set -eu
node=${1:-http://127.0.0.1:7480}

curl -sSN --fail-with-body "$node/v1/chat/completions" -H 'content-type: application/json' -d '{
  "model": "auto", "stream": true, "max_tokens": 40,
  "messages": [{"role": "user", "content": "Write a function that adds two numbers"}]
}'

# Who answered is in the headers.
curl -sS --fail-with-body -D - "$node/v1/chat/completions" -H 'content-type: application/json' -d '{
  "model": "auto", "max_tokens": 40,
  "messages": [{"role": "user", "content": "Write a function that adds two numbers"}]
}'
echo
