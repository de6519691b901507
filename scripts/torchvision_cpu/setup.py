"""Adds the file that Python reads when it starts; everything else is in ``pyproject.toml``."""

from setuptools import setup
from setuptools.command.build_py import build_py


class WithStartupFile(build_py):
    """Puts it next to the module."""

    def run(self):
        """Build as usual, then copy it."""
        super().run()
        self.copy_file("torchvision_cpu.pth", self.build_lib)


setup(cmdclass={"build_py": WithStartupFile})
