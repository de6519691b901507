"""A vLLM platform plugin for tests: vLLM's CPU platform with a Ray resource.

vLLM names no Ray resource for CPUs, and so refuses Ray there. This names Ray's own ``GPU``. The test cluster claims to
have two, so that everything except the device is as on GPU machines. The package does not know about this plugin.
"""


def platform() -> str:
    """Return the class that vLLM is to use. The entry point is in the folder next to this one."""
    return "ray_cpu.platform.RayCpuPlatform"
