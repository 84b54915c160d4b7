# SPDX-License-Identifier: BSD-3-Clause
"""docs/stability.md and docs/schemas.txt are what is registered, and nothing promised is broken."""

import pytest

from tools import stability

OLD = "masked_loss_ext::f(Tensor x, int n=1) -> Tensor y"


def test_page_and_schemas_are_what_is_registered():
    stability.main(["--check"])
    assert not stability.broken(stability.recorded(), stability.registered())


@pytest.mark.parametrize(
    "now, breaks",
    [
        (OLD, False),
        ("masked_loss_ext::f(Tensor x, int n=1, int m=2) -> Tensor y", False),
        ("masked_loss_ext::f(Tensor x, int n=1, *, Tensor? z=None) -> Tensor y", False),
        ("masked_loss_ext::f(Tensor x, int n=2) -> Tensor y", True),
        ("masked_loss_ext::f(Tensor x, int m, int n=1) -> Tensor y", True),
        ("masked_loss_ext::f(Tensor x) -> Tensor y", True),
        ("masked_loss_ext::f(Tensor x, int n=1) -> (Tensor y, Tensor z)", True),
        ("masked_loss_ext::g(Tensor x, int n=1) -> Tensor y", True),
    ],
)
def test_what_breaks_a_promise(now, breaks):
    name = now.partition("::")[2].partition("(")[0]
    assert bool(stability.broken({"f": OLD}, {name: now})) == breaks


def test_what_is_not_promised_may_change():
    assert not stability.broken({"_f": OLD.replace("::f", "::_f")}, {})


def test_a_broken_promise_is_not_written(tmp_path, monkeypatch):
    before = stability.recorded()
    kept = tmp_path / "schemas.txt"
    kept.write_text("\n".join(before.values()).replace("int ngram_size=4", "int ngram_size=5"))
    monkeypatch.setattr(stability, "SCHEMAS", kept)
    with pytest.raises(SystemExit, match="for two releases: repetition_counts is"):
        stability.main(["--write"])
    with pytest.raises(SystemExit, match="schemas.txt is not what is registered"):
        stability.main(["--check"])
