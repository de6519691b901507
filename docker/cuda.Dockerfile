# syntax=docker/dockerfile:1.7
# vLLM's own image for NVIDIA GPUs with vllm-nld added:
#   docker build --file docker/cuda.Dockerfile --tag vllm-nld:cuda .
FROM vllm/vllm-openai:v0.32.0

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/vllm-nld
COPY . .
# Without dependencies of its own choice: pip must leave the image's torch and vLLM as they are.
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip install --no-deps --no-build-isolation "scikit-build-core>=0.11" pathspec packaging \
    && python3 -m pip install --no-deps --no-build-isolation . \
    && python3 -c "import pydantic, safetensors, typer, rich, numpy, vllm_nld" \
    && useradd --create-home --uid 10001 nld \
    && install --directory --owner nld /cache

USER 10001
ENV HF_HOME=/cache/huggingface VLLM_CACHE_ROOT=/cache/vllm VLLM_NO_USAGE_STATS=1
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --start-period=20m --interval=15s --timeout=5s --retries=4 \
    CMD ["curl", "--fail", "--silent", "http://127.0.0.1:8000/health"]
ENTRYPOINT ["/opt/vllm-nld/docker/serve.sh"]
