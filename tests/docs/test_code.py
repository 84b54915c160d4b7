# SPDX-License-Identifier: BSD-3-Clause
"""Code on the pages of the documentation is run, and prints what it says; see common/pages.py."""

import pytest
from pages import PAGES, ROOT, blocks, run, unknown

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", PAGES)
def test_code_on_the_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what it writes is not left behind
    missing = run((ROOT / name).read_text(), name)
    if missing:
        pytest.skip(f"all ran but what needs {missing}, which is not installed")


@pytest.mark.parametrize("name", PAGES)
def test_every_block_says_what_it_is(name):
    found = [(b.line, unknown(b)) for b in blocks((ROOT / name).read_text())]
    wrong = [f"{name}:{line}: {what}" for line, what in found if what]
    assert not wrong


PAGE = """\
```python
import torch
x = 2
print(f"{x + 1} and {torch.tensor(0.123456):.3f}")
```

```text output
3 and 0...
```

1. In a list:

   ```pycon
   >>> x += 5
   >>> x
   7
   ```

```python not-run
import a_package_that_is_not_there
```

```python
assert x == 7
```
"""


def test_pages_are_run_in_one_namespace():
    assert [b.line for b in blocks(PAGE)] == [2, 8, 14, 20, 24]
    assert not any(map(unknown, blocks(PAGE)))
    assert run(PAGE, "page") == set()


@pytest.mark.parametrize(
    "was, is_now, message",
    [
        ("0...", "4", "page:8: the page says"),
        ("   7\n", "   8\n", "Expected:"),
        ("x == 7", "x == 8", ""),
        (" not-run", "", "a_package_that_is_not_there"),
    ],
)
def test_what_a_page_says_wrongly_is_found(was, is_now, message):
    with pytest.raises((AssertionError, ModuleNotFoundError), match=message):
        run(PAGE.replace(was, is_now), "page")


@pytest.mark.parametrize(
    "text, what",
    [
        ("```\nx\n```", "no language"),
        ("```py\nx\n```", "no language"),
        ("```python norun\nx\n```", "unknown words"),
        ("```{code-block} python\nx\n```", "is not run"),
    ],
)
def test_blocks_that_say_nothing_are_refused(text, what):
    assert what in unknown(*blocks(text))
