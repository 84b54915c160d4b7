# SPDX-License-Identifier: BSD-3-Clause
"""A library of one line, compiled by the project's own build in about a second.

``python tests/common/tiny_build.py FOLDER`` compiles it from FOLDER/csrc into FOLDER/built, in a
process of its own that does not import torch.
"""

import os
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "masked_loss_ext"
SOURCE = 'extern "C" __attribute__((visibility("default"))) int one() { return 1; }\n'
ADVICE = "set TORCH_EXTENSIONS_DIR to another folder"


def make_tree(folder):
    csrc = Path(folder) / "csrc"
    (csrc / "cpu").mkdir(parents=True)
    (csrc / "cpu" / "one.cpp").write_text(SOURCE)
    return csrc


def reduce(sources, csrc, patch=setattr):
    """Make the build, whose module `sources` is, compile that tree."""
    patch(sources, "csrc_dir", lambda: csrc)
    patch(sources, "LEVEL_SOURCES", [])
    patch(sources, "CPU_SOURCES", ["cpu/one.cpp"])
    patch(sources, "CUDA_SOURCES", [])
    patch(sources, "CUDA_HOST_SOURCES", [])


def command(folder):
    return [sys.executable, os.fsdecode(__file__), os.fspath(folder)]


def start(folder, **settings):
    # A locale that knows ASCII alone, as services and containers have it.
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    return subprocess.Popen(
        command(folder),
        env={**os.environ, **plain, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="backslashreplace",
    )


def main(folder):
    sys.path.insert(0, str(PACKAGE))
    from build import ninja, sources, toolchain

    sys.path.pop(0)
    reduce(sources, folder / "csrc")
    os.environ["MASKED_LOSS_EXT_CUDA"] = "0"
    tools = toolchain.find_toolchain()
    try:
        print(ninja.compile_library(tools, folder / "built", advice=ADVICE).name)
    except toolchain.BuildError as error:
        sys.exit(f"BuildError: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
