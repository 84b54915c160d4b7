# SPDX-License-Identifier: BSD-3-Clause
"""Every argument of every public function and module x every way to get it wrong, eagerly, as fake
tensors and under torch.compile. All of it: MASKED_LOSS_EXT_INVALID=all, or python -m tools.invalid.
"""

import inspect
import os
import random

import pytest
import torch

import masked_loss_ext as mle
from masked_loss_ext import distributed, unified
from tests.invalid import entries_unified
from tests.invalid.calling import Entry, problem
from tests.invalid.kinds import Way, first
from tests.invalid.table import ENTRIES

pytestmark = pytest.mark.slow
# Of the ways of one argument, at most so many in a mode; a compiled call takes tens of ms.
SHARE = {"eager": 8, "fake": 2, "compile": 1}
EVERY = os.environ.get("MASKED_LOSS_EXT_INVALID") == "all"

# Public names that no entry is of, and why.
WITHOUT = {
    "RowStatistics": "a tuple that others return",
    "ChannelInvariantTokenLoss": "another name of AttentionMaskMseLoss",
    "__version__": "a string",
    "reference": "plain PyTorch, with its errors",
    "distributed": "a module: its functions are",
    **dict.fromkeys(
        ["UnifiedLoss", "HiddenStateMTPLoss", "create_unified_loss"], "of the unified family"
    ),
    **dict.fromkeys(
        [
            *("AttentionMaskedNestedDropout", "MaskedNestedDropout", "NestedDropoutSequencePacker"),
            *("SequenceUnpacker", "packed_attention", "pad_latents_for_multi_res"),
        ],
        "dicts and lists of tensors: tests/attention/test_*_refusals.py, test_padding.py",
    ),
    "map_mask_to_latent": "tests/elementwise/test_padding.py",
    "MultiTokenPredictionLoss": "lists of heads: tests/cross_entropy/test_multi_token_calls.py",
    "show_config": "takes nothing",
    "check_padding": "takes functions: tests/diagnostics/test_errors.py",
}
OF_RANKS = {
    "PendingCount": "a handle that others return",
    "global_token_count": "tests/distributed/test_token_count.py",
    "keep_state_local": "takes a model: tests/distributed/test_local_state.py",
    "sync_state": "takes a model: tests/distributed/test_sync_state.py",
}
UNIFIED = {
    "CompositeLoss": "a dict of others' options: tests/unified/test_hostile.py",
    "MultiTokenPredictionLoss": "HiddenStateMTPLoss is its public name",
}


def covered():
    return {entry.name.partition(".")[0] for entry in ENTRIES} | {e.id.strip("()") for e in ENTRIES}


def test_every_public_name_has_an_entry_or_a_reason():
    of = {mle: WITHOUT, distributed: OF_RANKS, unified: UNIFIED}
    for module, without in of.items():
        names = module.__all__
        missing = {n for n in names if n not in covered() and n not in without}
        assert not missing, missing
        assert not set(without) - set(names)


def unclassified(entry):
    missing = set(entry.parameters()) - set(entry.arguments)
    cls = entry.name
    return {name for name in missing if (cls, name) not in entries_unified.ELSEWHERE}


def test_every_argument_is_classified():
    """Of a call of the unified family by some case of its class; what an operator takes besides is
    got wrong by tools.malformed."""
    found = {}
    for entry in (entry for entry in ENTRIES if not entry.alone):
        found.setdefault((entry.name, entry.compiles), []).append(unclassified(entry))
    missing = {key: set.intersection(*names) for key, names in found.items()}
    assert not {key: names for key, names in missing.items() if names}


def drawn(entry, argument, mode):
    ways = entry.ways(argument)
    if EVERY or (mode == "eager" and entry.compiles):  # a constructor takes no time
        return ways
    seed = random.Random(f"{entry.id} {argument} {mode}")
    return seed.sample(ways, min(len(ways), SHARE[mode]))


def few(entry, arguments):
    """Of those of one entry, as a compiled call of a large module takes a second."""
    return arguments if EVERY else random.Random(entry.id).sample(arguments, min(len(arguments), 2))


@pytest.mark.parametrize(
    "entry,mode",
    [(e, mode) for e in ENTRIES for mode in e.modes],
    ids=lambda x: x if isinstance(x, str) else x.id,
)
def test_wrong_calls(entry, mode):
    wrong = []
    arguments = [name for name in entry.parameters() if name in entry.arguments]
    for argument in arguments if mode != "compile" else few(entry, arguments):
        for way in drawn(entry, argument, mode):
            found = problem(entry, argument, way, mode)
            if found:
                wrong.append(f"{argument} {way.name}: {found}")
    assert not wrong, "\n".join(wrong)
    torch._dynamo.reset()


def test_an_error_of_other_words_would_be_seen():
    def refuses_nothing(logits):
        return logits

    def refuses_badly(logits):
        raise ValueError("bad logits")

    wrong = Way("a str", "x", TypeError)
    for call, said in ((refuses_nothing, "no error"), (refuses_badly, "not ")):
        entry = Entry("f", lambda call=call: call, {"logits": (torch.ones(2), first)})
        assert problem(entry, "logits", wrong, "eager").startswith(said)
    assert inspect.signature(refuses_badly).parameters
