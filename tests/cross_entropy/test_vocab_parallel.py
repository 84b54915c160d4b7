# SPDX-License-Identifier: BSD-3-Clause
"""The operators of shards of a vocabulary against the reference of whole rows: on the CPU, under
the simulator, and on a GPU where there is one. What goes between ranks: tests/distributed.
"""

import math

import pytest
import torch
from accuracy import assert_same_bits
from cases import FLOATING
from cuda_sim import compiler
from gpu_device import DEVICES, WANTED, device_named, gpu_device

if compiler() is None:
    pytest.skip("the CUDA simulator needs g++, and there is none", allow_module_level=True)

from sharded import ShardedCrossEntropy, ShardedLinear
from simulated_cross_entropy import check, random_upstream
from simulated_linear import check as check_linear

from tests.cuda.test_cross_entropy import NAMES, OPTIONS, filled, make
from tests.cuda.test_linear_cross_entropy import filled as filled_linear
from tests.cuda.test_linear_cross_entropy import make as make_linear

NAN, INF = float("nan"), float("inf")
PLACES = ([] if WANTED == "only" else ["cpu"]) + DEVICES
every_dtype = pytest.mark.parametrize("dtype", FLOATING, ids=lambda d: str(d)[6:])
OPS = torch.ops.masked_loss_ext


@pytest.fixture(params=PLACES)
def device(request):
    found = gpu_device("cpu") if request.param == "cpu" else device_named(request.param)
    yield found
    ShardedCrossEntropy([1], found).sim.reset()


def test_on_paper():
    """ln 1, ln 2 on one shard, ln 3, ln 2 on another: sums 3 and 5, of e^z = 1, 2, 3, 2."""
    logits, target = torch.tensor([[1.0, 2.0], [3.0, 2.0]]).log(), torch.tensor([1])
    shards = [logits[0:1], logits[1:2]]
    at = [{"vocab_start": 2 * i, "vocab_size": 4} for i in range(2)]
    messages = torch.stack(
        [
            OPS._vocab_parallel_cross_entropy_sums(x, target, **a)
            for x, a in zip(shards, at, strict=True)
        ]
    )
    # highest, label, and in two numbers the sum below the highest, of which the label is no part
    highest, label, *sums = messages[:, :4].T
    torch.testing.assert_close(highest, torch.tensor([0, math.log(3)]).double())
    torch.testing.assert_close(label, torch.tensor([math.log(2), 0]).double())
    torch.testing.assert_close(sum(sums), torch.tensor([1, 5 / 3]).double())
    for x, a in zip(shards, at, strict=True):
        found = OPS.vocab_parallel_cross_entropy(x, target, **a, messages=messages)
        torch.testing.assert_close(found[0].item(), math.log(8 / 2))
        torch.testing.assert_close(found[1].item(), math.log(8))
        grad = OPS._vocab_parallel_cross_entropy_backward(
            torch.ones(()), None, None, None, found[8], found[2], found[3], found[6], found[7],
            x, target, **a,
        )[0]  # fmt: skip
        expected = [[1 / 8, 2 / 8 - 1], [3 / 8, 2 / 8]][a["vocab_start"] // 2]
        torch.testing.assert_close(grad, torch.tensor([expected]))


@pytest.mark.parametrize("cuts", [[1], [1, 1], [3, 0, 1, 5], [0, 1, 0]], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_option(device, name, cuts):
    op = ShardedCrossEntropy(cuts, device)
    for shape, statistics in (((3, 4, 37), True), ((5, 70), False)):
        inputs = make(shape)
        upstream = random_upstream(inputs[0], OPTIONS[name].get("reduction"), statistics)
        check(op, *inputs, upstream=upstream, **filled(OPTIONS[name], inputs[0]))


@every_dtype
@pytest.mark.parametrize("classes", [1, 2, 1030, 40007])
def test_dtypes_and_lengths(device, dtype, classes):
    """Shards of one column, of pieces of a row, and of more than one piece."""
    op = ShardedCrossEntropy([2, 1, 4], device)
    for name in ("plain", "everything"):
        inputs = make((2, 3, classes), dtype)
        check(op, *inputs, **filled(OPTIONS[name], inputs[0]))


@pytest.mark.parametrize("cuts", [[1, 1], [3, 0, 1]], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_option_from_hidden_states(device, name, cuts):
    hidden, weight, target, mask = make_linear()
    options = filled_linear(name, hidden, weight)
    for more in ({}, {"bias": torch.randn(weight.shape[0]), "chunk_rows": 3}):
        check_linear(ShardedLinear(cuts, device), hidden, weight, target, mask, **options, **more)


@every_dtype
def test_dtypes_from_hidden_states(device, dtype):
    hidden, weight, target, mask = make_linear((2, 40), 5, 66, dtype)
    check_linear(ShardedLinear([1, 2, 0], device), hidden, weight, target, mask)


def test_no_row_counts(device):
    logits, target, _ = make((3, 8))
    none = torch.zeros(3, dtype=torch.bool)
    results = check(ShardedCrossEntropy([1, 3], device), logits.fill_(NAN), target, none)
    assert results["loss"] == 0 and not results["grad logits"].any()
    hidden, weight, target, _ = make_linear((3,))
    check_linear(ShardedLinear([1, 3], device), hidden, weight, target, none)


def test_banned_classes_and_infinities_in_other_shards(device):
    """-inf in a whole shard, +inf and NaN in one, the largest in two of them."""
    rows = torch.tensor(
        [
            [-INF, -INF, 1, 2], [1, INF, 2, 0], [2, NAN, 3, 1],
            [3, 1, 3, 0], [-INF] * 4, [0, -INF, -INF, 5],
        ]
    )  # fmt: skip
    target = torch.tensor([3, 0, 0, 2, 1, 1])
    op = ShardedCrossEntropy([1, 1], device)
    found = check(op, rows, target, reduction="none")
    assert found["argmax"].tolist() == rows.argmax(-1).tolist()
    assert found["hit"].tolist() == (rows.argmax(-1) == target).tolist()


def test_confident_rows_keep_their_digits(device):
    """What is beside the largest class is 5e-9 of it, in another shard."""
    logits = torch.zeros(1, 50257)
    logits[0, 3] = 30.0
    found = check(ShardedCrossEntropy([1, 5], device), logits, torch.tensor([3]))
    expected = torch.tensor(-50256 * math.exp(-30)).log1p()
    torch.testing.assert_close(found["log_prob"], expected.reshape(1), rtol=1e-6, atol=0)


def test_a_bad_label(device):
    logits, _, _ = make((2, 9))
    op = ShardedCrossEntropy([1, 2], device)
    target = torch.tensor([4, 9])
    if device is gpu_device("cpu"):
        with pytest.raises(IndexError, match=r"target at row \[1\] must be in \[0, 9\)"):
            op(logits, target)
    else:
        assert op(logits, target).results["loss"].isnan()


# --- ranks that do not fit -----------------------------------------------------------------------


def merged(device, calls):
    """The loss of the first shard; calls: the keywords of each."""
    op = ShardedCrossEntropy([1], device)
    target = op.upload(torch.tensor([1, 3]))
    logits = [op.upload(torch.randn(2, call.pop("columns", 2))) for call in calls]
    for call in calls:
        for name in ("temperature", "normalizer"):
            if name in call:
                call[name] = op.number(call[name])
    with op.sim.order("ascending"):
        sums = op.ops._vocab_parallel_cross_entropy_sums
        every = [sums(x, target, **call) for x, call in zip(logits, calls, strict=True)]
        messages = op.gathered(every)
        found = op.ops.vocab_parallel_cross_entropy(
            logits[0], target, **calls[0], messages=messages
        )
    return op.sim.download(found[0])


@pytest.mark.parametrize(
    "first, second, text",
    [
        ({"vocab_start": 0}, {"vocab_start": 1}, "where the shards of the ranks before end"),
        ({"vocab_start": 0}, {"vocab_start": 2, "columns": 1}, "got of the ranks 0 [+] 2, 2 [+] 1"),
        ({"vocab_start": 0}, {"vocab_start": 2, "vocab_size": 5}, "vocab_size must be the same"),
        ({}, {"temperature": 2.0}, "temperature must be the same on all ranks"),
        ({"temperature": 1.0}, {"temperature": 2.0}, "temperature must be the same on all ranks"),
        ({"normalizer": 3.0}, {"normalizer": 2.0}, "normalizer must be the same on all ranks"),
        ({"z_loss": 0.1}, {"z_loss": 0.2}, "all keywords must be the same on all ranks"),
        ({"ignore_index": -1}, {}, "all keywords must be the same on all ranks"),
        ({"reduction": "sum"}, {}, "all keywords must be the same on all ranks"),
    ],
    ids=str,
)
def test_shards_that_do_not_fit(device, first, second, text):
    calls = [{"vocab_start": 2 * i, "vocab_size": 4} | c for i, c in enumerate((first, second))]
    if device is gpu_device("cpu"):
        with pytest.raises(ValueError, match=text):
            merged(device, calls)
    else:
        assert merged(device, calls).isnan()


@pytest.mark.parametrize(
    "change, text",
    [
        ({"vocab_start": -1}, "vocab_start must be in"),
        ({"vocab_size": 0}, "vocab_size must be in"),
        ({"vocab_start": 3, "vocab_size": 4}, "vocab_size must be at least vocab_start and the"),
        ({"messages": None}, "messages must be given"),
        ({"messages": torch.zeros(1, 3, dtype=torch.float64)}, "messages must be what all ranks"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(change, text):
    given = {"vocab_start": 0, "vocab_size": 2, "messages": torch.zeros(1, 14).double()} | change
    with pytest.raises(ValueError, match=text):
        OPS.vocab_parallel_cross_entropy(torch.randn(2, 2), torch.tensor([0, 1]), **given)


def test_messages_hold_what_is_asked_for():
    logits, target = torch.randn(5, 4), torch.zeros(5, dtype=torch.int64)
    at = {"vocab_start": 0, "vocab_size": 4}
    for options, numbers in (
        ({}, 4), ({"statistics": True}, 6), ({"label_smoothing": 0.1}, 6),
        ({"statistics": True, "label_smoothing": 0.1}, 8),
    ):  # fmt: skip
        message = OPS._vocab_parallel_cross_entropy_sums(logits, target, **options, **at)
        assert message.shape == (5 * numbers + 6,) and message.dtype == torch.float64
        with torch._subclasses.FakeTensorMode() as mode:
            like = mode.from_tensor(logits), mode.from_tensor(target)
            fake = OPS._vocab_parallel_cross_entropy_sums(*like, **options, **at)
        assert fake.shape == message.shape and fake.dtype == message.dtype


def test_the_same_bits_each_time():
    logits, target, mask = make((7, 40007))
    at = {"vocab_start": 0, "vocab_size": 40007}
    first = OPS._vocab_parallel_cross_entropy_sums(logits, target, mask, **at)
    torch.set_num_threads(1)
    assert_same_bits(OPS._vocab_parallel_cross_entropy_sums(logits, target, mask, **at), first, "")
