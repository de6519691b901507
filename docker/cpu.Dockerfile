# syntax=docker/dockerfile:1.7
# vLLM on CPUs with vllm-nld, set up by the script that developers and CI use:
#   docker build --file docker/cpu.Dockerfile --tag vllm-nld:cpu .
FROM python:3.11.13-slim-bookworm

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# g++ compiles the kernels now, and what torch.compile makes when the server starts; vLLM loads libnuma.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends curl g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 nld \
    && install --directory --owner nld /cache /opt/vllm-nld

USER 10001
WORKDIR /opt/vllm-nld
COPY --chown=10001 . .
RUN --mount=type=cache,target=/home/nld/.cache/pip,uid=10001 scripts/setup.sh --no-demo

# What is fetched or compiled once stays in the volume: models, and torch.compile's results.
ENV PATH=/opt/vllm-nld/.venv/bin:$PATH HF_HOME=/cache/huggingface VLLM_CACHE_ROOT=/cache/vllm VLLM_NO_USAGE_STATS=1
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --start-period=10m --interval=15s --timeout=5s --retries=4 \
    CMD ["curl", "--fail", "--silent", "http://127.0.0.1:8000/health"]
ENTRYPOINT ["/opt/vllm-nld/docker/serve.sh"]
