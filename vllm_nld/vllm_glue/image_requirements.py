"""What reading images needs in addition to what text needs."""

from __future__ import annotations

import importlib
from functools import cache

from vllm_nld.vllm_glue.versions import installed_vllm, release_of

OLDEST = (0, 32)
"""The first vLLM that leaves the tokens of an image to its processor."""


@cache
def why_no_images() -> str | None:
    """Return one line saying why no model here can read images, or None if one can."""
    found = installed_vllm()
    if found is not None and release_of(found[1]) < OLDEST:
        return f"images need vLLM {'.'.join(map(str, OLDEST))} or newer, found {found[0]} {found[1]}"
    for module, package in (("torchvision", "torchvision"), ("cv2", "opencv-python-headless")):
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken torchvision raises whatever it likes
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return (
                f"images need {package}, which cannot be imported: {reason}; install the build that belongs to this "
                "torch (scripts/setup.sh does it for a CPU)"
            )
    return None
