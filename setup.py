# SPDX-License-Identifier: BSD-3-Clause
"""Ahead-of-time build where torch can be found, else a package that compiles itself.

MASKED_LOSS_EXT_BUILD = auto | aot | jit. torch is not a build requirement on purpose: an isolated
build would download several GB of it, and not the one that is installed.
"""

import filecmp
import sys
from importlib.util import find_spec
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "masked_loss_ext"))
from build.files import copy_whole, sentence  # noqa: E402
from build.ninja import compile_library  # noqa: E402
from build.toolchain import (  # noqa: E402
    BuildError,
    check_settings,
    find_toolchain,
    say,
    setting,
)

sys.path.pop(0)

# Without build isolation pip takes the environment's, and what venv puts there is older; it would
# refuse pyproject.toml with ninety lines.
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        "masked_loss_ext: setuptools 77 or newer is needed to build, found "
        f"{setuptools.__version__}; get it with: pip install --upgrade 'setuptools>=77'"
    )


class BuildLibrary(build_ext):
    """Hands the one extension to the project's own build."""

    def finalize_options(self):
        super().finalize_options()
        self.for_this_machine = self.inplace or self.editable_mode  # no wheel; run() resets inplace

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            tools = find_toolchain(for_others=not self.for_this_machine)
            # A folder that outlives the command: only what changed is compiled the next time.
            kind = "cuda" if tools.cuda_home else "cpu"
            folder = ROOT / "build" / f"native-torch{tools.torch_version}-{kind}"
            library = compile_library(tools, folder)
            if not target.is_file() or not filecmp.cmp(library, target, shallow=False):
                target.parent.mkdir(parents=True, exist_ok=True)
                copy_whole(library, target)
        except BuildError as error:
            raise CompileError(f"masked_loss_ext: {error}") from None
        except OSError as error:
            raise CompileError(f"masked_loss_ext: {sentence(error, target)}") from None


class OneWheel(bdist_wheel):
    """One for all interpreters: the library has no symbol of Python and is loaded by PyTorch.

    abi3 would say the same of CPython, but shut out its free-threaded builds, which know no abi3.
    """

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def ahead_of_time():
    try:
        check_settings()
    except BuildError as error:
        sys.exit(f"masked_loss_ext: {error}")
    mode = setting("MASKED_LOSS_EXT_BUILD")
    if mode == "auto" and find_spec("torch") is None:
        say(
            "PyTorch is not visible to this build, so the kernels will be compiled at the first "
            "import; to compile them now: pip install --no-build-isolation ."
        )
        return False
    return mode != "jit"


# ninja is a run-time dependency only of the package that compiles itself.
native = {"install_requires": ["torch>=2.10", "ninja"]}
if ahead_of_time():
    native = {
        "install_requires": ["torch>=2.10"],
        "ext_modules": [Extension("masked_loss_ext._C", sources=[], py_limited_api=True)],
        "cmdclass": {"build_ext": BuildLibrary, "bdist_wheel": OneWheel},
    }
# The sources travel inside the package, for the builds that are made at the first import.
csrc = [
    ".".join(("masked_loss_ext.csrc", *folder.relative_to(ROOT / "csrc").parts))
    for folder in (ROOT / "csrc", *sorted((ROOT / "csrc").rglob("*")))
    if folder.is_dir()
]
setup(
    packages=find_packages(include=["masked_loss_ext", "masked_loss_ext.*"]) + csrc,
    package_dir={"masked_loss_ext.csrc": "csrc"},
    **native,
)
