"""Builds the native kernels into the package; what else there is to say is in pyproject.toml."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))

from services.core.kernels.build import BuildError, build, library_path


class BuildWithKernels(build_py):
    def run(self) -> None:
        try:
            build()
        except BuildError as error:
            self.warn(f"the native kernels were not built; torch's are used instead: {error}")
        super().run()


class WheelWithKernels(bdist_wheel):
    """For this machine's platform and any Python, if it has a library in it."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        if not library_path().exists():
            return python, abi, platform
        return "py3", "none", self.plat_name.replace("-", "_").replace(".", "_")


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelWithKernels})
