# The CUDA image with Ray, for KubeRay, which starts Ray in it by itself:
#   docker build --file docker/cuda-ray.Dockerfile --tag vllm-nld:cuda-ray .
FROM vllm-nld:cuda

USER 0
RUN python3 -m pip install --no-cache-dir "ray[data,serve]==2.60.0"
USER 10001
HEALTHCHECK NONE
ENTRYPOINT []
