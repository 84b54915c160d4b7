# SPDX-License-Identifier: BSD-3-Clause
"""Several documents in one row: with segment_ids each is treated as a row of its own.

What is compared with: the same documents, one per row, padded; and one call per document.
"""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from masked_loss_ext import HiddenStateMTPLoss, UnifiedLoss
from masked_loss_ext.unified import (
    AdaptiveMTPLoss,
    DeepSeekLoss,
    NGramRepetitionPenalty,
    SequenceRepetitionDetector,
    TemperatureScaledCrossEntropy,
)

V, H, EOS, PAD = 5, 4, 3, 4
LENGTHS = [[6, 1, 8, 4], [7, 5, 6]]  # two rows; the second ends in padding of one
LONGEST, SIZE = 8, 19


def packed(seed=0, vocabulary=V):
    """Entries [2, 19, ...] and the ids of the documents; few tokens, so that much repeats."""
    g = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(2, SIZE, *shape, generator=g, dtype=torch.float64)

    ids = torch.full((2, SIZE), -1)
    for b, row in enumerate(LENGTHS):
        found = torch.cat([torch.full((n,), 7 - d) for d, n in enumerate(row)])
        ids[b, : len(found)] = found
    targets = torch.randint(vocabulary - 1, (2, SIZE), generator=g)
    targets[0, 5] = targets[0, 6] = targets[0, 7] = 1  # a run across two borders
    targets[0, 12], targets[1, 2] = PAD, -100
    return {
        "logits": noise(V),
        "targets": targets,
        "attention_mask": ids >= 0,
        "hidden_states": noise(H),
        "additional_logits": [noise(V), noise(V)],
        "confidence_scores": noise(1).sigmoid(),
        "segment_ids": ids,
    }


def split(tensor):
    """[2, 19, ...] -> documents [7, 8, ...], zeros behind their end; differentiable."""
    rows = []
    for b, row in enumerate(LENGTHS):
        for piece in tensor[b, : sum(row)].split(row):
            shape = (LONGEST - len(piece), *piece.shape[1:])
            rows.append(torch.cat([piece, piece.new_zeros(shape)]))
    return torch.stack(rows)


def documents(entries):
    """The same entries, a document per row."""
    return {
        name: [split(x) for x in value] if isinstance(value, list) else split(value)
        for name, value in entries.items()
        if name != "segment_ids"
    }


def leaves(entries, names):
    found = []
    for name in names:
        value = entries[name]
        found += value if isinstance(value, list) else [value]
    return [x.requires_grad_() for x in found if x.is_floating_point()]


LOGITS = ("logits", "targets", "attention_mask")
HEADS = (*LOGITS, "additional_logits", "confidence_scores")
EVERYTHING = dict(
    use_mtp=True,
    num_future_tokens=3,
    ngram_size=2,
    eos_token_id=EOS,
    pad_token_id=PAD,
    min_sequence_length=3,
    use_focal_loss=True,
)
ADAPTIVE = dict(primary_loss_type="adaptive_mtp", eos_token_id=EOS, min_sequence_length=3)
MODULES = {
    "mtp": (
        lambda: HiddenStateMTPLoss(V, H),
        ("hidden_states", "target_ids", "attention_mask"),
        lambda out: out["mtp_loss"],
    ),
    "mtp_shared": (
        lambda: HiddenStateMTPLoss(V, H, 5, shared_projection=True, mask_sources=True),
        ("hidden_states", "target_ids", "attention_mask"),
        lambda out: out["mtp_loss"],
    ),
    "deepseek": (
        lambda: DeepSeekLoss(V, H, eos_token_id=EOS, min_sequence_length=3),
        (*LOGITS, "hidden_states"),
        lambda out: out["total_loss"],
    ),
    "adaptive": (
        lambda: AdaptiveMTPLoss(V, label_smoothing=0.1),
        ("primary_logits", *HEADS[1:]),
        lambda out: out["loss"],
    ),
    **{
        f"{name}_{on}": (make, LOGITS, loss)
        for on in ("targets", "model")
        for name, make, loss in (
            (
                "temperature",
                lambda on=on: TemperatureScaledCrossEntropy(
                    0.8, vocab_size=V, eos_token_id=EOS, min_sequence_length=3, penalty_on=on
                ),
                lambda out: out["loss"],
            ),
            *(
                (
                    f"ngram{n}",
                    lambda on=on, n=n: NGramRepetitionPenalty(n, 0.1, V, penalty_on=on),
                    lambda out: out["total_repetition_penalty"],
                )
                for n in (1, 2, 3, 9)
            ),
            (
                "unified",
                lambda on=on: UnifiedLoss(V, H, **EVERYTHING, penalty_on=on),
                lambda out: out,
            ),
            (
                "shifted",
                lambda on=on: UnifiedLoss(V, H, **EVERYTHING, penalty_on=on, shift_labels=True),
                lambda out: out,
            ),
            ("heads", lambda on=on: UnifiedLoss(V, H, **ADAPTIVE, penalty_on=on), lambda out: out),
        )
    },
    "runs_model": (
        lambda: SequenceRepetitionDetector(penalty_on="model"),
        ("token_ids", "attention_mask", "logits"),
        lambda out: out["immediate_repetition_penalty"],
    ),
    "second_heads": (
        lambda: UnifiedLoss(V, H, use_mtp=True, mtp_type="adaptive"),
        HEADS,
        lambda out: out,
    ),
}
ALIASES = {"target_ids": "targets", "token_ids": "targets", "primary_logits": "logits"}


def names_of(name):
    names = MODULES[name][1]
    if name.startswith(("unified", "shifted")):
        names = (*names, "hidden_states")
    return HEADS if name.startswith("heads") else names


def evaluate(name, module, entries, leaf_entries):
    """Loss and gradients of the leaves and parameters."""
    names = names_of(name)
    given = {key: entries[ALIASES.get(key, key)] for key in names}
    if "segment_ids" in entries:
        given["segment_ids"] = entries["segment_ids"]
    if "additional_logits" in names:
        given["mtp_active"] = True
    loss = MODULES[name][2](module(**given))
    found = leaves(leaf_entries, [ALIASES.get(key, key) for key in names])
    inputs = [*found, *module.parameters()]
    return loss, torch.autograd.grad(loss, inputs, allow_unused=True)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_as_one_document_per_row(name, seed):
    torch.manual_seed(seed)
    module = MODULES[name][0]().double()
    entries = packed(seed)
    leaves(entries, [ALIASES.get(key, key) for key in names_of(name)])
    loss, grads = evaluate(name, copy.deepcopy(module), entries, entries)
    expected, expected_grads = evaluate(name, module, documents(entries), entries)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    for x, y in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-14)
    without = {k: v for k, v in entries.items() if k != "segment_ids"}
    whole = evaluate(name, copy.deepcopy(module), without, entries)[0]
    if "ngram9" not in name:  # no window of nine fits into a document, and none repeats in a row
        assert (whole - expected).abs() > 1e-6, "borders make a difference"


def test_mtp_as_one_call_per_document():
    """A head's mean is over its targets of all documents; a head longer than all is 0."""
    torch.manual_seed(0)
    module = HiddenStateMTPLoss(V, H, 5).double()
    entries = packed()
    out = module(
        *(entries[k] for k in ("hidden_states", "targets", "attention_mask")),
        segment_ids=entries["segment_ids"],
    )
    sums, counts = torch.zeros(5, dtype=torch.float64), torch.zeros(5)
    for b, row in enumerate(LENGTHS):
        ends = torch.tensor(row).cumsum(0).tolist()
        for start, end in zip([0, *ends], ends, strict=False):
            hidden = entries["hidden_states"][b : b + 1, start:end]
            targets = entries["targets"][b : b + 1, start:end]
            parts = module(hidden, targets)["per_token_losses"]
            for k in range(5):
                n = (targets[:, k + 1 :] != -100).sum()
                sums[k] += parts[k] * n
                counts[k] += n
    torch.testing.assert_close(torch.stack(out["per_token_losses"]), sums / counts)


def test_counts_by_hand():
    """1 1 | 1 1 2: with borders the bigrams are 11 / 11 12, without 11 11 11 12."""
    row, ids = torch.tensor([[1, 1, 1, 1, 2]]), torch.tensor([[0, 0, 1, 1, 1]])
    penalty = NGramRepetitionPenalty(2, 1.0, V)
    assert penalty.compute_ngram_repetition_penalty(row).item() == 0.75
    assert penalty.compute_ngram_repetition_penalty(row, segment_ids=ids).item() == 0
    ones = torch.ones_like(row)
    # 11 | 11 11: one pair of three windows
    found = penalty.compute_ngram_repetition_penalty(ones, segment_ids=ids)
    assert found.item() == pytest.approx(1 / 3)
    detector = SequenceRepetitionDetector()
    key = "immediate_repetition_penalty"
    assert detector(ones)[key] == 16  # (5 - 1)^2
    assert detector(ones, segment_ids=ids)[key] == 2.5  # ((2 - 1)^2 + (3 - 1)^2) / 2


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_one_row_of_ids_serves_a_batch(dtype):
    entries = packed()
    ids = torch.tensor([[3] * 7 + [4] * 12], dtype=dtype)
    loss_fn = UnifiedLoss(V, ngram_size=2, shift_labels=True)
    given = {k: entries[k] for k in LOGITS}
    one = loss_fn(**given, segment_ids=ids, update_state=False)
    all_ = loss_fn(**given, segment_ids=ids.expand(2, -1).long(), update_state=False)
    assert torch.equal(one, all_)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (2, 1)])
def test_nothing_to_cut(shape):
    logits = torch.zeros(*shape, V, requires_grad=True)
    targets = torch.zeros(shape, dtype=torch.int64)
    for on in ("targets", "model"):
        loss_fn = UnifiedLoss(V, ngram_size=2, eos_token_id=EOS, penalty_on=on)
        hidden = dict(segment_ids=targets, update_state=False)
        loss = loss_fn(logits, targets, **hidden)
        assert torch.equal(loss, loss_fn(logits, targets, update_state=False))


REFUSED = [
    (torch.zeros(2, 4), ValueError, "segment_ids must be integers, got torch.float32"),
    ([[0, 0]], TypeError, "segment_ids must be a torch.Tensor, got list"),
    (torch.zeros(3, 4).long(), ValueError, "segment_ids must have the shape of"),
    (torch.zeros(4).long(), ValueError, "[2, 4] (or one row for all), got [4]"),
    (torch.zeros(2, 4, device="meta").long(), ValueError, "segment_ids must be on the device of"),
]


@pytest.mark.parametrize("ids,kind,text", REFUSED)
def test_what_is_refused(ids, kind, text):
    logits, targets = torch.zeros(2, 4, V), torch.zeros(2, 4, dtype=torch.int64)
    hidden = torch.zeros(2, 4, H)
    for call in (
        lambda: UnifiedLoss(V)(logits, targets, segment_ids=ids),
        lambda: DeepSeekLoss(V, H)(logits, targets, hidden, segment_ids=ids),
        lambda: HiddenStateMTPLoss(V, H)(hidden, targets, segment_ids=ids),
        lambda: AdaptiveMTPLoss(V)(logits, targets, segment_ids=ids),
        lambda: TemperatureScaledCrossEntropy(vocab_size=V)(logits, targets, segment_ids=ids),
        lambda: NGramRepetitionPenalty(vocab_size=V)(logits, targets, segment_ids=ids),
        lambda: SequenceRepetitionDetector()(targets, segment_ids=ids),
    ):
        with pytest.raises(kind) as caught:
            call()
        assert text in str(caught.value)


@pytest.mark.parametrize("name", ["unified_targets", "unified_model"])
def test_one_graph(name):
    torch._dynamo.reset()
    counters.clear()
    module = MODULES[name][0]().double()
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        entries = packed(seed)
        found = leaves(entries, names_of(name))
        ours, grads = evaluate(name, compiled, entries, entries)
        theirs, expected = evaluate(name, eager, entries, entries)
        torch.testing.assert_close(ours, theirs)
        for x, y in zip(grads[: len(found)], expected[: len(found)], strict=True):
            torch.testing.assert_close(x, y)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
