#!/usr/bin/env bash
# Start the server in a container. MODEL is a checkpoint: tiny, or a folder or Hugging Face name; arguments are those of
# vllm serve. Anything that begins with vllm-nld is run instead: docker run ... vllm-nld:cpu vllm-nld doctor
set -euo pipefail
[ "${1:-}" != vllm-nld ] || exec "$@"
name=${MODEL:-tiny}
case $name in
tiny | tiny_vlm | smollm2) folder=$(vllm-nld path "$name") ;;
*) folder=$name ;;
esac
exec vllm serve "$folder" --served-model-name "$name" --host 0.0.0.0 --port 8000 \
    --speculative-config '{"model": "vllm_nld.SelfSpeculation"}' "$@"
