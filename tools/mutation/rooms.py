# SPDX-License-Identifier: BSD-3-Clause
"""Which tests are to catch the mutants of a room, those that fail soonest first."""

from __future__ import annotations

ROOMS: dict[str, tuple[str, ...]] = {
    # --- Python ---
    "padding": (
        "tests/elementwise/test_padding.py",
        "tests/attention/test_nested_dropout_ids.py",
    ),
    "token losses": (
        "tests/elementwise/test_hand_worked.py",
        "tests/elementwise/test_normalizer.py",
        "tests/elementwise/test_mask_laws.py",
        "tests/elementwise/test_values.py",
        "tests/elementwise/test_errors.py",
        "tests/cross_entropy/test_aggregate.py",
    ),
    "aggregates": (
        "tests/cross_entropy/test_zero_denominator.py",
        "tests/cross_entropy/test_hand_worked.py",
        "tests/cross_entropy/test_aggregate.py",
    ),
    "checks": (
        "tests/elementwise/test_mask_dtypes.py",
        "tests/elementwise/test_errors.py",
        "tests/cross_entropy/test_errors.py",
        "tests/unified/test_errors.py",
    ),
    "cross entropy in Python": (
        "tests/cross_entropy/test_hand_worked.py",
        "tests/cross_entropy/test_layouts.py",
        "tests/cross_entropy/test_aggregate.py",
        "tests/cross_entropy/test_values.py",
    ),
    "ways to operators": (
        "tests/cross_entropy/test_inplace.py",
        "tests/cross_entropy/test_sweep.py",
        "tests/elementwise/test_autograd.py",
        "tests/elementwise/test_torch_func.py",
        "tests/cross_entropy/test_autograd.py",
    ),
    "linear in Python": (
        "tests/linear_cross_entropy/test_hand_worked.py",
        "tests/linear_cross_entropy/test_dtypes.py",
        "tests/linear_cross_entropy/test_autograd.py",
    ),
    "multi-token": (
        "tests/cross_entropy/test_multi_token.py",
        "tests/cross_entropy/test_multi_token_calls.py",
    ),
    "row intervals": (
        "tests/attention/test_row_intervals.py",
        "tests/attention/test_block_mask_ops.py",
    ),
    "attention": (
        "tests/attention/test_packed_attention.py",
        "tests/attention/test_packed_attention_laws.py",
    ),
    "unified": (
        "tests/unified/test_on_paper.py",
        "tests/unified/test_state.py",
        "tests/unified/test_packed.py",
        "tests/unified/test_anti_repetition.py",
        "tests/unified/test_diversity.py",
        "tests/unified/test_loss.py",
        "tests/unified/test_laws.py",
        "tests/unified/test_robust.py",
    ),
    "token counts of ranks": ("tests/distributed/test_token_count.py",),
    "shards of ranks": (
        "tests/distributed/test_vocab_parallel.py",
        "tests/distributed/test_vocab_parallel_ways.py",
    ),
    "DTensors": (
        "tests/distributed/test_dtensor_squared_error.py",
        "tests/distributed/test_dtensor_cross_entropy.py",
        "tests/distributed/test_dtensor_linear.py",
    ),
    "trainer": (
        "tests/integrations/test_transformers_labels.py",
        "tests/integrations/test_transformers_callback.py",
        "tests/integrations/test_transformers_columns.py",
    ),
    "diagnostics": (
        "tests/diagnostics/test_check_padding.py",
        "tests/diagnostics/test_report.py",
        "tests/diagnostics/test_batches.py",
    ),
    "build": (
        "tests/build/test_files.py",
        "tests/build/test_library_cache.py",
    ),
    # --- C++ on the CPU ---
    "elementwise": (
        "tests/elementwise/test_mask_zeros.py",
        "tests/elementwise/test_hand_worked.py",
        "tests/elementwise/test_values.py",
        "tests/elementwise/test_element_losses.py",
        "tests/elementwise/test_mask_laws.py",
        "tests/elementwise/test_strides.py",
        "tests/elementwise/test_errors.py",
        "tests/elementwise/test_fresh_memory.py",
    ),
    "elementwise errors": ("tests/elementwise/test_errors.py",),
    "cross entropy errors": (
        "tests/cross_entropy/test_errors.py",
        "tests/cross_entropy/test_inplace.py",
    ),
    "cross entropy": (
        "tests/cross_entropy/test_hand_worked.py",
        "tests/cross_entropy/test_digits.py",
        "tests/cross_entropy/test_values.py",
        "tests/cross_entropy/test_shift.py",
        "tests/cross_entropy/test_numbers.py",
        "tests/cross_entropy/test_sweep.py",
        "tests/cross_entropy/test_layouts.py",
        "tests/cross_entropy/test_laws.py",
        "tests/cross_entropy/test_saved.py",
        "tests/cross_entropy/test_errors.py",
    ),
    "shards": (
        "tests/cross_entropy/test_vocab_parallel.py",
        "tests/cross_entropy/test_vocab_parallel_errors.py",
    ),
    "terms": (
        "tests/cross_entropy_terms/test_values.py",
        "tests/cross_entropy_terms/test_laws.py",
        "tests/cross_entropy_terms/test_errors.py",
        "tests/unified/test_on_paper.py",
    ),
    "linear": (
        "tests/linear_cross_entropy/test_hand_worked.py",
        "tests/linear_cross_entropy/test_values.py",
        "tests/linear_cross_entropy/test_excluded.py",
        "tests/linear_cross_entropy/test_compaction.py",
        "tests/linear_cross_entropy/test_dtypes.py",
        "tests/linear_cross_entropy/test_errors.py",
    ),
    "repetition": (
        "tests/repetition/test_values.py",
        "tests/repetition/test_errors.py",
    ),
    "block mask": (
        "tests/attention/test_block_mask_ops.py",
        "tests/attention/test_packed_layout.py",
        "tests/attention/test_block_mask_errors.py",
    ),
    # --- CUDA, under the simulator ---
    "elementwise, simulated": (
        "tests/cuda/test_kernels.py",
        "tests/cuda/test_kernels_memory.py",
    ),
    "cross entropy, simulated": (
        "tests/cuda/test_cross_entropy.py",
        "tests/cuda/test_cross_entropy_digits.py",
        "tests/cuda/test_cross_entropy_rows.py",
        "tests/cuda/test_cross_entropy_memory.py",
    ),
    "sweep, simulated": (
        "tests/cuda/test_cross_entropy_sweep.py",
        "tests/cuda/test_cross_entropy_cluster.py",
    ),
    "terms, simulated": ("tests/cuda/test_cross_entropy_terms.py",),
    "linear, simulated": ("tests/cuda/test_linear_cross_entropy.py",),
    "shards, simulated": ("tests/cross_entropy/test_vocab_parallel.py",),
    "repetition, simulated": ("tests/cuda/test_repetition.py",),
    "block mask, simulated": ("tests/cuda/test_block_mask.py",),
}
