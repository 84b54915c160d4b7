#!/usr/bin/env python
# SPDX-License-Identifier: BSD-3-Clause
"""Train something real with masked_loss_ext and measure what its losses change.

python examples/demo.py                  all acts: about 5 minutes on two cores, language 2 of them
python examples/demo.py --quick          seconds: does everything run?
python examples/demo.py --acts language  one act; "repetition" (2 minutes) is run by name alone
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Before PyTorch loads its OpenMP runtime: threads that spin while they wait for one that is not
# running made training 4 times slower on a machine that other programs use as well.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # the measuring code is shared with benchmarks/
    sys.path.append(str(ROOT))

from acts import ACTS, DEFAULT, Options, run_act  # noqa: E402


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train something real with masked_loss_ext and measure what its losses change.",
        epilog="acts: " + "; ".join(f"{name}: {what}" for name, what in ACTS.items()),
    )
    parser.add_argument("--acts", nargs="+", choices=ACTS, default=DEFAULT, metavar="ACT")
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), metavar="DIR")
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: cuda where there is one")
    parser.add_argument("--steps", type=int, help="training steps of each act")
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args(arguments)
    if wanted.steps is not None and wanted.steps < 1:
        parser.error(f"argument --steps: must be at least 1, got {wanted.steps}")
    try:
        wanted.device = pick_device(wanted.device)
    except ValueError as error:
        parser.error(f"argument --device: {error}")
    return wanted


def pick_device(name: str | None) -> torch.device:
    if name is None:
        usable = torch.cuda.is_available() and cuda_kernels_built()
        return torch.device("cuda" if usable else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"{name!r} is not a device") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{name!r} was asked for, but PyTorch finds no CUDA device here")
    if device.type == "cuda" and not cuda_kernels_built():
        raise ValueError(f"{name!r} was asked for, but the library was built without CUDA kernels")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"must be cpu or cuda, got {name!r}")
    return device


def cuda_kernels_built() -> bool:
    import masked_loss_ext  # noqa: F401  (registers the operators)

    name = "masked_loss_ext::masked_squared_error"
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


def describe_kernels(device: torch.device) -> str:
    """Which library this is and which of its kernels the demo runs."""
    import masked_loss_ext as mle

    how = {"aot": "built ahead of time", "jit": "compiled at first import"}
    kind = how.get(mle._library_kind, "loaded before the package")
    built = "built" if cuda_kernels_built() else "not built"
    if device.type == "cuda":
        used = f"used, on {torch.cuda.get_device_name(device)}"
    else:
        used = "not used, no CUDA device" if not torch.cuda.is_available() else "not used"
    return (
        f"masked_loss_ext {mle.__version__} ({kind}), PyTorch {torch.__version__}\n"
        f"kernels: CPU {torch.ops.masked_loss_ext.cpu_capability()}, {torch.get_num_threads()} "
        f"threads; CUDA {built}, {used}"
    )


def main() -> None:
    wanted = parse_arguments()
    print(describe_kernels(wanted.device), flush=True)
    wanted.output.mkdir(parents=True, exist_ok=True)
    options = Options(wanted.output, wanted.device, wanted.steps, wanted.quick, wanted.seed)
    for name in wanted.acts:
        print(f"\n{name}: {ACTS[name]}", flush=True)
        run_act(name, options)


if __name__ == "__main__":
    main()
