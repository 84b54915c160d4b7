# SPDX-License-Identifier: BSD-3-Clause
"""What a docstring does not say of a public name: what it costs, how exact it is, where it ends.

One ``Family`` for all that share it; names.py says of which family a name is, and what is its own.
Figures are not written here: ``benchmark``, ``fuzz`` and ``operators`` name the lines of the
committed files that they are read from. Text is reStructuredText.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

Cases = tuple[tuple[str, tuple[str, ...]], ...]  # of (file of benchmarks/results, names of cases)


@dataclass(frozen=True)
class Family:
    title: str
    counts: str = ""
    formula: str = ""  # where the docstring shows none
    equivalent: str = ""  # where the docstring shows none
    accuracy: str = ""
    traffic: str = ""
    limits: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    fuzz: tuple[str, ...] = ()
    benchmark: Cases = ()
    room: str = ""  # the folder of its tests


RULE = (
    "Truth is the reference on float64 copies of the inputs. Each element may be off by at most "
    "twice the largest relative error that the reference has in the inputs' dtype, and one "
    "rounding. "
)
DERIVATIVES = (
    "``torch.func.vmap``, forward mode and second derivatives are right, but go by plain PyTorch, "
    "with its memory."
)
GPU = "nvidia_h200/figures"

ROWS = Family(
    "Cross entropy of logits",
    counts="A row counts where the mask is on and its label is not ``ignore_index``. With "
    "``shift`` mask and label are those that the row predicts.",
    accuracy=RULE + "As terms cancel here, error is measured against the sum of what is added, "
    "without signs (``tests/common/accuracy_cross_entropy.py``). Zeros, NaN and infinities have to "
    "stand where the reference has them.",
    traffic="For k rows that count out of N, V classes and elements of s bytes, the forward reads "
    "k V s bytes of logits; the backward reads k V s and writes N V s. Per row some 32 to 48 bytes "
    "of results. No copy of the logits is made.",
    limits=(
        "One class per row: no soft labels.",
        "A label out of range is an error on the CPU alone; on CUDA, where looking would mean "
        "waiting, that row is NaN.",
        "A mask selects and does not weigh: 0.5 counts fully.",
        DERIVATIVES,
    ),
    operators=("masked_cross_entropy", "_masked_cross_entropy_backward"),
    fuzz=("cross_entropy", "cross_entropy_sweep"),
    benchmark=(
        ("cross_entropy_cpu", ("train_*k", "train_*k_bf16", "train_*_inplace", "forward_*k")),
        (GPU, ("forward_*", "train_*", "fused_*")),
    ),
    room="cross_entropy",
)
STATISTICS = replace(
    ROWS,
    fuzz=("row_statistics",),
    benchmark=(("cross_entropy_cpu", ("statistics_*",)),),
    limits=("``hit`` and ``argmax`` have no gradient.", DERIVATIVES),
)
LINEAR = Family(
    "Cross entropy of hidden states",
    counts="As for logits: a row counts where the mask is on and its label is not "
    "``ignore_index``. Hidden states of other rows take part in no product.",
    formula="That of ``masked_cross_entropy``, of the logits :math:`h W^\\top + b`.",
    accuracy=RULE + "A logit is a sum itself and is measured as one "
    "(``tests/common/accuracy_linear.py``); where halves are multiplied, a rounding is one of "
    "theirs.",
    traffic="For k rows that count, hidden size D and V classes: 6 k D V operations for a mean or "
    "sum whose gradient is made in the forward, 8 k D V where the logits are made again. Logits "
    "are held a chunk at a time, 128 MiB of them on the CPU, 512 MiB on CUDA.",
    limits=(
        "The matrix products are ATen's: for another number of threads MKL may cut a sum "
        "elsewhere, and the last bits differ.",
        "On CUDA the number of rows that count is waited for, unless ``num_valid`` is given.",
        "Second derivatives, ``vmap`` and forward mode make the logits as a whole.",
    ),
    operators=(
        "linear_cross_entropy",
        "_linear_cross_entropy_backward",
        "_linear_cross_entropy_sweep",
    ),
    fuzz=("linear_cross_entropy", "linear_sweep"),
    benchmark=(
        ("linear_cross_entropy_cpu", ("train*", "memory_*")),
        (GPU, ("linear_1*",)),
    ),
    room="linear_cross_entropy",
)
LINEAR_STATISTICS = replace(
    LINEAR,
    fuzz=("linear_row_statistics",),
    benchmark=(("linear_cross_entropy_cpu", ("statistics",)), (GPU, ("linear_statistics_*",))),
)
SQUARES = Family(
    "Squared errors",
    counts="A token or element counts where its mask is not 0. Others are not read and their "
    "gradient is exactly 0; with nothing left the loss is 0, attached to the graph.",
    accuracy=RULE + "(``tests/common/accuracy.py``.) Zeros, NaN and infinities have to stand where "
    "the reference has them.",
    traffic="For n selected elements of s bytes out of N: the forward reads 2 n s, the backward "
    "reads 2 n s and writes N s, and each one entry per row of every mask and weight. No "
    "temporary of the inputs' size.",
    limits=(
        "On a GPU slower than ``torch.compile`` (figures above): index arithmetic, not bytes.",
        "A mask selects and does not weigh: weights go into ``edit_mask`` and ``weighting``.",
        DERIVATIVES,
    ),
    operators=("masked_squared_error", "_masked_squared_error_backward"),
    fuzz=("squared_error", "token_losses", "element_losses"),
    benchmark=(("squared_error_cpu", ("token_*",)), (GPU, ("tokens_*",))),
    room="elementwise",
)
ELEMENTS = replace(SQUARES, benchmark=(("squared_error_cpu", ("masked_mse*",)),))
MASKS = Family(
    "Masks, labels and padding",
    counts="What these make says what counts for the losses; they drop nothing themselves.",
    formula="None: it moves or marks data, as the text below says.",
    accuracy="Nothing is rounded: results are compared bit by bit with the reference.",
    traffic="One read of what is given and one write of the result, in plain PyTorch.",
    limits=("Plain PyTorch, no operator of its own.",),
    fuzz=("padding",),
    room="elementwise",
)
AGGREGATE = replace(
    MASKS,
    title="Cross entropy of logits",
    counts="A token counts where the mask is not 0. What is stored elsewhere, NaN too, changes "
    "nothing.",
    accuracy=RULE + "Sums are float64.",
    limits=("Plain PyTorch, no operator of its own.",),
    fuzz=("aggregate_tokens", "rows_by_name", "tokens_by_name"),
    room="cross_entropy",
)
BLOCKS = Family(
    "Attention masks",
    counts="A query sees a key of its own sample where both are visible and the mode allows it; "
    "padding and dropped tokens see nothing and are not seen.",
    formula="None: a set of pairs, as the text below says.",
    accuracy="Integers: every index is that of ``create_block_mask`` over the dense mask.",
    traffic="S numbers per interval of a row and the lists of blocks; no mask of S x S is made.",
    limits=("Up to eight intervals a row; a row with more holes takes ``create_block_mask``.",),
    operators=("nested_dropout_plan", "packed_rows", "interval_block_lists"),
    fuzz=("packed_rows", "intervals", "mask_sources", "packed_layouts"),
    benchmark=(
        ("block_mask_cpu", ("full_*", "causal_*")),
        (GPU, ("plan_*",)),
    ),
    room="attention",
)
PIPELINE = replace(
    BLOCKS,
    accuracy="Nothing is rounded: tokens are copied, masks are integers.",
    traffic="One copy of the tokens; the mask is that of ``PackedLayout``.",
    limits=("Lists of tensors of one sample each, in a dict that is passed on.",),
    operators=(),
    benchmark=(),
)
ATTENTION = replace(
    BLOCKS,
    accuracy="That of the backend: PyTorch's own attention does the arithmetic. Tests hold each "
    "backend to float64 and to one another.",
    traffic="That of the backend; ``slices`` and ``varlen`` see the visible tokens alone.",
    limits=(
        "``flex`` and ``sdpa`` let a NaN in a visible token reach other samples, as PyTorch does.",
    ),
    operators=(),
    benchmark=(),
)
UNIFIED = Family(
    "Unified loss and its parts",
    counts="A row counts where ``attention_mask`` is on and its target is not ``ignore_index``, in "
    "every component. With none the loss is 0, attached to the graph.",
    accuracy=RULE + "Each part is held to the same formula in plain PyTorch.",
    traffic="All that looks at logits shares one read of k V s bytes forward, and one read and one "
    "write of N V s backward (``cross_entropy_terms``).",
    limits=(
        "State is each rank's own until ``sync_state``.",
        "DTensors are refused: give it ``logits.full_tensor()``.",
    ),
    operators=("cross_entropy_terms", "_cross_entropy_terms_backward"),
    fuzz=("unified_loss", "unified_modules", "terms"),
    room="unified",
)
WHOLE = replace(UNIFIED, benchmark=(("unified_cpu", ("targets", "model")),))
HEADS = replace(
    UNIFIED,
    traffic=LINEAR.traffic,
    operators=LINEAR.operators[:2],
    fuzz=("hidden_state_mtp",),
    limits=("The projections are read, not called: hooks on them are refused.",),
)
FEATURES = replace(
    UNIFIED,
    counts="What the mask excludes is selected away, with a gradient of 0; it is read, though.",
    traffic="Plain PyTorch on tensors without a vocabulary.",
    limits=("Plain PyTorch, no operator of its own.",),
    operators=(),
    fuzz=("unified_modules",),
)
MIXTURE = replace(
    FEATURES, counts="Sums what it is given; what counts is what its losses count.", fuzz=()
)
REPETITION = Family(
    "Repetition",
    counts="A position counts where ``valid`` is not 0; no window and no run reaches across one "
    "that does not.",
    formula="None: positions of equal windows, as the text below says.",
    accuracy="Exact: integers, and tokens are compared; a hash never decides alone.",
    traffic="S entries of tokens and valid per row, and tables of that size; invalid tokens are "
    "not read.",
    limits=("No gradient: these are counts of the data.",),
    operators=("repetition_counts", "repetition_links"),
    fuzz=("repetition",),
    benchmark=(("unified_cpu", ("repetition_counts",)),),
    room="repetition",
)
RANKS = Family(
    "More than one process",
    counts="As on one process, over all ranks together.",
    formula="None: what ranks send each other is on the page :doc:`scale </scale>`.",
    equivalent="None: it is a message between ranks, or the lack of one.",
    accuracy="Counts are exact up to 2^53.",
    traffic="Messages and bytes: the page :doc:`scale </scale>`, counted on 2 and 4 processes.",
    limits=("Every rank has to call, in the same order.",),
    room="distributed",
)
SHARDS = replace(
    RANKS,
    counts=ROWS.counts,
    formula="That of ``masked_cross_entropy``, of all ranks' classes together.",
    accuracy=ROWS.accuracy,
    traffic="Each rank reads and writes its own V / R classes as ``masked_cross_entropy`` does, "
    "and sends 32 to 48 bytes a row: the page :doc:`scale </scale>`.",
    operators=(
        "_vocab_parallel_cross_entropy_sums",
        "vocab_parallel_cross_entropy",
        "_vocab_parallel_cross_entropy_backward",
    ),
    fuzz=("cross_entropy", "linear_cross_entropy"),
)
PADDING = Family(
    "Does it leak?",
    counts="What the mask excludes is changed, and nothing that the rest computes may move.",
    formula="None: it runs your step several times and compares.",
    equivalent="None: there is no such check in PyTorch. What it does is told under `What "
    "counts`_.",
    accuracy="Two runs of the same batch have to agree within ``atol`` and ``rtol``; what differs "
    "by itself is measured first.",
    traffic="Some passes of your own step over one batch, and copies of its tensors, gradients and "
    "the buffers that it can be seen to use.",
    limits=("Not for models that are sharded over ranks.",),
    room="diagnostics",
)
REPORT = Family(
    "What is installed here?",
    counts="Nothing of yours: versions, the library and each operator's way.",
    formula="None.",
    equivalent="``torch.__config__.show()`` and ``torch.utils.collect_env``, of PyTorch.",
    accuracy="It says what it finds, and where it finds nothing that this is so.",
    traffic="None of yours: no operator is called. It asks for the versions of compiler, ninja and "
    "nvcc, which takes a part of a second.",
    limits=("It says how each operator would go, not what a call took.",),
    room="build",
)
TRAINERS = Family(
    "Where people train",
    counts="Labels of -100 do not count; ``MaskLabels`` puts the mask into them.",
    formula="None: it connects a loss with a trainer.",
    equivalent="None: it is a part of the connection, not of the arithmetic.",
    accuracy="That of the loss that it calls.",
    traffic="That of the loss that it calls.",
    limits=("Tested with the releases that requirements.txt names.",),
    room="integrations",
)
CAUSAL_LM = replace(
    TRAINERS, operators=ROWS.operators, accuracy=ROWS.accuracy, traffic=ROWS.traffic
)
LOGIT_FREE = replace(
    TRAINERS,
    accuracy=LINEAR.accuracy,
    traffic=LINEAR.traffic,
    operators=LINEAR.operators,
    benchmark=(("logit_free_cpu", ("step",)),),
)
