"""The page of ``vllm-nld chat``, and the small server on loopback that serves it and passes requests on."""
