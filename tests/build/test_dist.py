# SPDX-License-Identifier: BSD-3-Clause
"""What a wheel and a source archive must be: make dist and test_install.py ask the same; here,
that each fault is seen."""

import re
import tarfile
import zipfile

import pytest

from masked_loss_ext.build import sources
from tools.dist import content

VERSION = sources.VERSION
NAME = f"masked_loss_ext-{VERSION}-py3-none-manylinux_2_28_x86_64.whl"
INFO = f"masked_loss_ext-{VERSION}.dist-info"


def good_wheel():
    csrc = sources.csrc_dir()
    files = {f"masked_loss_ext/csrc/{p.relative_to(csrc)}": "" for p in csrc.rglob("*.*")}
    return files | {
        "masked_loss_ext/": "",
        "masked_loss_ext/__init__.py": "",
        "masked_loss_ext/py.typed": "",
        f"masked_loss_ext/{sources.LIBRARY}": "",
        f"{INFO}/licenses/LICENSE": "",
        f"{INFO}/WHEEL": "Root-Is-Purelib: false\nTag: py3-none-manylinux_2_28_x86_64\n",
        f"{INFO}/METADATA": "Requires-Dist: torch>=2.10\nRequires-Dist: numpy; extra == 'demo'\n",
    }


def problems(folder, files, name=NAME):
    with zipfile.ZipFile(folder / name, "w") as wheel:
        for place, text in files.items():
            wheel.writestr(place, text)
    return content.problems_of_wheel(folder / name)


def test_a_good_wheel_has_no_problem(tmp_path):
    assert not problems(tmp_path, good_wheel())


@pytest.mark.parametrize(
    "name",
    [
        NAME.replace("py3-none", "cp310-abi3"),  # shuts out free-threaded interpreters
        NAME.replace("py3-none", "cp311-cp311"),
        NAME.replace("manylinux_2_28_x86_64", "any"),
        NAME.replace(VERSION, "9.9"),
    ],
)
def test_another_name_is_a_problem(tmp_path, name):
    assert problems(tmp_path, good_wheel(), name) == [f"its name is {name}"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tests/test_x.py": ""}, "tests/test_x.py is no part of the package"),
        ({"masked_loss_ext/tests/x.py": ""}, "no part of the package"),
        ({"masked_loss_ext/a.o": ""}, "masked_loss_ext/a.o is of no kind"),
        ({"masked_loss_ext/other.so": ""}, "it has not the one library"),
        ({f"masked_loss_ext/{sources.LIBRARY}": None}, "it has not the one library"),
        ({"masked_loss_ext/csrc/schemas.cpp": None}, "schemas.cpp is missing"),
        ({"masked_loss_ext/csrc/repetition/cuda/kernels.cuh": None}, "kernels.cuh is missing"),
        ({f"{INFO}/licenses/LICENSE": None}, "the licence is missing"),
        ({f"{INFO}/WHEEL": "Tag: cp310-abi3-linux_x86_64\n"}, "its tags are ['cp310-abi3"),
        ({f"{INFO}/METADATA": "Requires-Dist: torch\n"}, "it requires ['torch']"),
        ({f"{INFO}/METADATA": "Requires-Dist: torch>=2.10\nRequires-Dist: ninja\n"}, "ninja"),
    ],
)
def test_each_fault_is_seen(tmp_path, change, problem):
    files = {name: text for name, text in (good_wheel() | change).items() if text is not None}
    (found,) = problems(tmp_path, files)
    assert problem in found


def test_faults_of_an_archive(tmp_path):
    (tmp_path / "empty").touch()
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "empty", "x-1/csrc/schemas.cpp")
        archive.add(tmp_path / "empty", "x-1/masked_loss_ext/_C.abi3.so")
    found = content.problems_of_archive(tmp_path / "x.tar.gz")
    assert "LICENSE is missing" in found and "csrc/schemas.cpp is missing" not in found
    assert found[-1] == "masked_loss_ext/_C.abi3.so is built"


# --- what forges and other packagers read --------------------------------------------------------


def read(name):
    path = content.ROOT / name
    if not path.is_file():
        pytest.skip(f"{name} is not part of this checkout")
    return pytest.importorskip("yaml").safe_load(path.read_text())


def test_every_file_names_the_same_version_and_licence():
    citation, recipe = read("CITATION.cff"), read("conda/recipe.yaml")
    assert citation["version"] == recipe["context"]["version"] == VERSION
    assert citation["license"] == recipe["about"]["license"] == "BSD-3-Clause"
    project = (content.ROOT / "pyproject.toml").read_text()
    for line in recipe["requirements"]["run"]:
        wanted = {"python >=3.10": 'requires-python = ">=3.10"', "pytorch >=2.10": None}[line]
        assert wanted is None or wanted in project


@pytest.mark.parametrize("name", ["tests", "wheels", "docs"])
def test_workflows_call_verbs_that_there_are(name):
    jobs = read(f".github/workflows/{name}.yml")["jobs"].values()
    lines = "\n".join(step.get("run", "") for job in jobs for step in job["steps"])
    verbs = re.findall(r"^make (\w+)", lines, re.M)
    assert verbs or ".ci/run" in lines
    makefile = (content.ROOT / "Makefile").read_text()
    missing = [verb for verb in verbs if not re.search(rf"^{verb}:", makefile, re.M)]
    assert not missing


def test_issue_forms_ask_for_the_report():
    for name in ("wrong_or_failing", "slow"):
        form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
        asked = [part for part in form["body"] if part.get("id") == "report"]
        assert "`python -m masked_loss_ext`" in asked[0]["attributes"]["label"]
        assert asked[0]["validations"]["required"] is True
