"""A vLLM platform plugin for tests: vLLM's CPU platform, which Ray may place.

vLLM names no Ray resource for CPUs, and so refuses Ray there. This names Ray's own ``GPU``, of which the test cluster
has two on paper, so that all runs as on GPU machines but for the device. The package knows nothing of it.
"""


def platform() -> str:
    """Return the class that vLLM is to use; the entry point in the folder beside."""
    return "ray_cpu.platform.RayCpuPlatform"
