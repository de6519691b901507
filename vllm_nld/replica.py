"""Moved to :mod:`vllm_nld.serving.replica`; this name works for one more release."""

from vllm_nld.serving.replica import *  # noqa: F403

if __name__ == "__main__":
    from vllm_nld.serving.replica import main

    main()
