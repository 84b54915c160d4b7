# SPDX-License-Identifier: BSD-3-Clause
"""The measured tables of docs/performance.md and README.md, made from the CSV files in
benchmarks/results.

A table stands between ``<!-- benchmark NAME -->`` and ``<!-- /benchmark -->``, NAME.csv its source;
that of "gpu" is what `make gpu` wrote, a table for each GPU, and that of "summary" a few lines of
several files. Where there are no figures the page says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tools import documents

from .report import number_text, read_csv, size_text, time_text

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "docs" / "performance.md", ROOT / "README.md")
COMMAND = "python -m benchmarks tables"
RESULTS = ROOT / "benchmarks" / "results"
NO_FIGURES = "No figures yet.\n"
REPRINT = {"workloads": "python -m benchmarks --workload all"}  # others by their names
Rows = Sequence[Mapping[str, str]]
# Lines of the summary: words, file, case, and who stands in the columns of PyTorch.
SUMMARY = (
    ("cross entropy, forward and backward", "cross_entropy_cpu", "train_128k", "eager", "compile"),
    ("the same, bfloat16", "cross_entropy_cpu", "train_128k_bf16", ".float()", "compiled .float()"),
    ("from hidden states", "linear_cross_entropy_cpu", "train", "eager", "compile"),
    ("step of a Qwen2-like model, no logits", "logit_free_cpu", "step", "own loss", ""),
    ("squared error of tokens", "squared_error_cpu", "token_large", "eager", "compile"),
    ("block mask of nested dropout", "block_mask_cpu", "full_4k", "eager", "compile"),
)


def by_case(rows: Rows) -> dict[str, Rows]:
    found: dict[str, list] = {}
    for row in rows:
        found.setdefault(row["case"], []).append(row)
    return found


def against_text(row: Mapping[str, str]) -> str:
    """How many times faster ours is than this contender; one that was not timed says so."""
    ratio = number_text(row["ratio_of_medians"], "{:.1f}x") or "not timed"
    if row["status"].startswith("not attempted"):
        ratio = row["status"].replace(": ", " (") + ")"
    wanted = number_text(row["target"], " (aim {:g}x)")
    return f"{row['contender']} {ratio}{wanted}"


def floor_text(row: Mapping[str, str]) -> str:
    """How many times longer ours takes than this floor."""
    wanted = number_text(row["target"], " (aim at most {:g}x)")
    return number_text(row["distance"], "{:.1f}x ") + row["contender"] + wanted


def listed(rows: Rows, role: str, text: Callable[[Mapping[str, str]], str]) -> str:
    return ", ".join(text(row) for row in rows if row["role"] == role)


def peak_text(row: Mapping[str, str]) -> str:
    # Where next to nothing is used two decimals would hide how little.
    form = "{:.3f}" if float(row["peak_over_gradient"] or 1) < 0.1 else "{:.2f}"
    wanted = number_text(row["peak_limit"], " (aim at most {:g})")
    return number_text(row["peak_over_gradient"], form) + wanted


def share_text(row: Mapping[str, str]) -> str:
    """What ours needs of this contender's peak memory."""
    wanted = number_text(row.get("peak_share_limit"), " (aim at most {:g})")
    share = number_text(row.get("peak_share"), "{:.2f} of ")
    return f"{share}{row['contender']}'s{wanted}" if share else ""


def time_aim_text(row: Mapping[str, str]) -> str:
    limit = row.get("time_limit_us")  # not in the figures of older runs
    return f" (aim at most {float(limit) / 1e3:g} ms)" if limit else ""


def size_texts(rows: Rows) -> str:
    """Of ours and of the others, where there is no gradient to set it beside."""
    found = []
    for row in rows:
        if row["peak_extra_bytes"] and not row["peak_over_gradient"]:
            limit = size_text(row.get("peak_limit_bytes"))
            aim = f" (aim at most {limit})" if limit else ""
            found.append(f"{row['contender']} {size_text(row['peak_extra_bytes'])}{aim}")
    return ", ".join(found)


def case_cells(rows: Rows) -> dict[str, str]:
    """Heading and text of each cell of a case's line."""
    ours = next(row for row in rows if row["role"] == "ours")
    shape = ours["shape"].replace("x", ", ")
    copy = number_text(ours["of_copy"], " ({:.0%} of a copy)")
    shares = [text for text in map(share_text, rows) if text]
    ratio, sizes = peak_text(ours), size_texts(rows)
    return {
        "case": f"`{ours['case']}`",
        "shape": f"[{shape}] {ours['dtype']}, {ours['summary']}",
        "time": time_text(ours["median_us"]) + time_aim_text(ours),
        "times faster than": listed(rows, "rival", against_text),
        "times as long as": listed(rows, "floor", floor_text),
        "GB/s": number_text(ours["gb_per_s"], "{:.1f}") + copy,
        "peak memory / gradient": ", ".join([ratio, *shares]) if ratio else "",
        "peak memory": sizes if ratio else ", ".join(filter(None, [sizes, *shares])),
    }


def rounds_text(rows: Rows) -> str:
    rounds = sorted({int(row["rounds"]) for row in rows if row["rounds"]})
    return " to ".join(str(one) for one in dict.fromkeys((rounds[0], rounds[-1])))


def markdown_table(rows: Rows, command: str = "") -> str:
    first = rows[0]
    name = first["benchmark"]
    command = command or REPRINT.get(name, f"python -m benchmarks {name}")
    lines = [case_cells(group) for group in by_case(rows).values()]
    heads = [head for head in lines[0] if any(line[head] for line in lines)]
    table = documents.markdown([heads, *([line[head] for head in heads] for line in lines)])
    return (
        f"{table}\nMedian of {rounds_text(rows)} rounds on {machine_text(first)}, "
        f"{first['date']}. Reprint with `{command}`.\n"
    )


def summary(results: Path) -> str:
    """A line for each: our time, those of PyTorch, what we need of its memory."""
    table = [
        ["what", "shape", "ours", "PyTorch, eager", "torch.compile", "peak memory, ours : eager"]
    ]
    for words, name, case, eager, compiled in SUMMARY:
        of = {row["contender"]: row for row in by_case(read_csv(results / f"{name}.csv"))[case]}
        ours = of["ours"]
        detail = f"[{ours['shape'].replace('x', ', ')}] {ours['dtype']}, {ours['summary']}"
        times = [
            time_text(of[who]["median_us"]) if who else "" for who in ("ours", eager, compiled)
        ]
        sizes = [size_text(of[who]["peak_extra_bytes"]) for who in ("ours", eager)]
        table.append([words, detail, *times, " : ".join(sizes) if all(sizes) else ""])
    return documents.markdown(table) + "\n" + machine_text(ours) + ".\n"


def machine_text(row: Mapping[str, str]) -> str:
    return (
        f"{row['processor']} ({row['capability']}), {row['threads']} threads, "
        f"PyTorch {row['torch']}"
    )


def tables_of(name: str, results: Path) -> list[str]:
    if name == "summary":
        return [summary(results)]
    if name == "gpu":
        sources = sorted(results.glob("*/figures.csv"))
        return [markdown_table(read_csv(source), "make gpu") for source in sources]
    source = results / f"{name}.csv"
    return [markdown_table(read_csv(source))] if source.exists() else []


def regenerate(text: str, results: Path = RESULTS) -> str:
    """``text`` with every table made anew from its CSV."""
    return documents.regenerate(
        text, "benchmark", lambda name: "\n".join(tables_of(name, results)) or NO_FIGURES
    )


def update(pages: Sequence[Path] = PAGES, results: Path = RESULTS, check: bool = False) -> str:
    """Write the tables, or with ``check`` only compare. Returns what is wrong, or nothing.

    The first page has tables, others may have some.
    """
    wrong = []
    for i, page in enumerate(pages):
        text = page.read_text()
        if i == 0 or documents.names(text, "benchmark"):
            wrong.append(documents.update(page, regenerate(text, results), COMMAND, check))
    return "; ".join(filter(None, wrong))
