# SPDX-License-Identifier: BSD-3-Clause
"""What machine this is: GPU, driver, versions. ``python -m tools.gpu.about`` prints it."""

from __future__ import annotations

import platform
import re
import subprocess

SMI = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]


def said(command: list[str]) -> str:
    """What a program prints; nothing where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def gpu_lines() -> list[str]:
    """Name, driver, memory of each GPU, as the driver's tool has them."""
    return said(SMI).splitlines()


def folder_name(gpus: list[str]) -> str:
    """A folder for results of this machine: its first GPU's name in letters, digits, "_"."""
    name = gpus[0].partition(",")[0] if gpus else "no_gpu"
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def main() -> None:
    import torch

    gpus = gpu_lines()
    print("\n".join(f"GPU: {line}" for line in gpus) or "GPU: none")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}")
    print("nvcc:", (said(["nvcc", "--version"]).splitlines() or ["not on PATH"])[-1])
    print("commit:", said(["git", "log", "-1", "--format=%h %cs"]) or "not a git checkout")


if __name__ == "__main__":
    main()
