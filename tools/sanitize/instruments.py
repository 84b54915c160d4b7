# SPDX-License-Identifier: BSD-3-Clause
"""The compilers' flags for each sanitizer, and the programs that are looked at under it."""

from __future__ import annotations

from pathlib import Path

from ..instrument import ROOT, Instrument, sources, toolchain

CPP = ROOT / "tests" / "cpp"
COMMON = ("-O1", "-g1", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS")

# What PyTorch and Python keep to the end is no leak, and a test may ask for more memory than there
# is. The simulator's fibers change stacks.
PYTHON_OPTIONS = "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1"

# What UndefinedBehaviorSanitizer asks of null pointers and of objects' sizes AddressSanitizer sees.
ADDRESS = Instrument(
    "address",
    (
        *COMMON,
        "-fsanitize=address,undefined,float-cast-overflow",
        "-fno-sanitize=null,object-size",
        "-fno-sanitize-recover=all",
    ),
    # PyTorch throws from where no sanitizer is linked: its exceptions must be found too.
    runtime=("libasan.so", "libubsan.so", "libstdc++.so.6"),
    settings={"MASKED_LOSS_EXT_CUDA": "0", "ASAN_OPTIONS": PYTHON_OPTIONS},
)
THREAD = Instrument("thread", (*COMMON, "-fsanitize=thread"))
# clang links no sanitizer into a library, and libstdc++'s compiled strings are not to be taken.
MEMORY = Instrument(
    "memory",
    (*COMMON, "-fsanitize=memory", "-Wl,-z,undefs", "-Wl,-Bsymbolic"),
    compiler="clang++",
)


def torch_free_program(instrument: Instrument) -> Path:
    """tests/cpp/torch_free, with tests/cpp/stand_in in the place of libtorch_cpu.so, which the
    library asks for by name: an empty one is beside the program."""
    empty = instrument.folder / "stand_in" / "libtorch_cpu.so"
    if not empty.is_file():
        empty.parent.mkdir(parents=True, exist_ok=True)
        nothing = ["-shared", "-x", "c++", "/dev/null", "-Wl,-soname,libtorch_cpu.so"]
        toolchain.answer_of([instrument.command(), *nothing, "-o", str(empty)])
    defines = [f"-D{one}" for one in sources.DEFINES]
    files = [*sorted((CPP / "stand_in").glob("*.cpp")), *sorted((CPP / "torch_free").glob("*.cpp"))]
    needed = [
        "-Wl,--no-as-needed",
        f"-L{empty.parent}",
        "-ltorch_cpu",
        f"-Wl,-rpath,{empty.parent}",
    ]
    return instrument.program(
        "torch_free", files, [*needed, "-rdynamic", "-Wno-attributes", *defines]
    )


def with_torch_program(instrument: Instrument, library: Path) -> Path:
    """tests/cpp/test_ops.cpp, which calls the library through PyTorch's dispatcher."""
    folder = toolchain.torch_about()[0]
    flags = [
        "-std=c++20",  # as ATen's headers ask
        "-isystem",
        folder / "include" / "torch" / "csrc" / "api" / "include",
        "-Wl,--no-as-needed",
        library,
        f"-L{folder / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
        f"-Wl,-rpath,{folder / 'lib'}",
    ]
    return instrument.program("test_ops", [CPP / "test_ops.cpp"], flags)
