# SPDX-License-Identifier: BSD-3-Clause
"""A training step of a small language model of transformers with a large vocabulary.

step: forward and backward alone; trainer: by the real Trainer, with AdamW (trainer_problem.py).

ours            logit_free(model): its loss from the hidden states.
own loss        the model as it is.
causal_lm_loss  of its logits.
trunk alone     forward and backward of the model below its head: what no loss can save. Shares of
                peak memory are of what is above it.

Qwen2 with 4 layers of 512, tied weights and its own vocabulary, 4 rows of 256 tokens of which 40 %
are padding. Loss and all gradients are checked against the model in float64, with the logits of
the predicted tokens alone. Needs transformers.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from .harness import Case, Contender, Problem, View

LENGTHS, QUICK_LENGTHS = (256, 180, 120, 58), (16, 9, 5)
TRUNK = "trunk alone"
# Of a float32 network of 4 layers, relative to the largest entries of the gradients.
TOLERANCE = 1e-4


def make_model(vocabulary: int, width: int, layers: int):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config)


def make_batch(lengths: tuple[int, ...], vocabulary: int, device: str) -> list[Tensor]:
    """ids, mask and labels; padding on the right."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, mask.shape, generator=generator) * mask
    return [one.to(device) for one in (ids, mask.long(), torch.where(mask, ids, -100))]


def reference(model, names: list[str], *inputs: Tensor) -> Tensor:
    """The mean over the predicted tokens, whose logits alone are made."""
    *weights, ids, mask, labels = inputs
    below = {
        name.removeprefix("model."): weight for name, weight in zip(names, weights, strict=True)
    }
    batch = {"input_ids": ids, "attention_mask": mask}
    hidden = torch.func.functional_call(model.model, below, (), batch).last_hidden_state[:, :-1]
    counts = labels[:, 1:] != -100
    return F.cross_entropy(F.linear(hidden[counts], weights[0]), labels[:, 1:][counts])


def step_problem(
    lengths: tuple[int, ...], vocabulary: int, width: int, layers: int, device: str
) -> Problem:
    from masked_loss_ext.integrations.transformers import causal_lm_loss, logit_free

    model = make_model(vocabulary, width, layers).to(device)
    names, weights = zip(*model.named_parameters(), strict=True)  # the first is the head's too
    # Another model of the same parameters.
    free = logit_free(copy.deepcopy(model, {id(weight): weight for weight in weights}))

    def ours(*inputs):
        ids, mask, labels = inputs[-3:]
        return free(input_ids=ids, attention_mask=mask, labels=labels).loss

    def own(*inputs):
        ids, mask, labels = inputs[-3:]
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss

    def of_logits(*inputs):
        ids, mask, labels = inputs[-3:]
        return causal_lm_loss(model(input_ids=ids, attention_mask=mask), labels)

    def trunk(*inputs):
        ids, mask, _ = inputs[-3:]
        return model.model(input_ids=ids, attention_mask=mask).last_hidden_state.mean()

    batch = make_batch(lengths, vocabulary, device)
    inputs = [(*weights, *batch)]
    return Problem(
        [
            Contender("ours", ours, inputs),
            Contender("own loss", own, inputs),
            Contender("causal_lm_loss", of_logits, inputs),
        ],
        functools.partial(reference, model, list(names)),
        bytes_moved=0,
        gradient_bytes=weights[0].nbytes,
        beside=[Contender(TRUNK, trunk, inputs, role="information")],
        gradient_tolerance=TOLERANCE,
        gradient_unit=1 / sum(lengths),  # p - 1 of a token's label, over the tokens
    )


def case_of(view: View, problem: Callable[..., Problem], sizes: tuple, device: str) -> Case:
    lengths, vocabulary, width, _ = sizes
    return Case(
        view.name,
        view.summary,
        (len(lengths), max(lengths), width, vocabulary),
        torch.float32,
        functools.partial(problem, *sizes, device),
        views=(view,),
        rounds=5,  # seconds for a step
    )


def cases(device: str = "cpu", quick: bool = False) -> list[Case]:
    """The aims are promises for a CPU with two threads."""
    if find_spec("transformers") is None:
        raise SystemExit("logit_free needs transformers: pip install '.[hf]'")
    from .trainer_problem import trainer_problem

    promised = torch.device(device).type == "cpu" and not quick
    sizes = (QUICK_LENGTHS, 1000, 64, 2) if quick else (LENGTHS, 151936, 512, 4)
    step = View(
        "step",
        "forward and backward, 40 % padded",
        targets={"own loss": 1.55} if promised else {},
        time_limit_us=2.6e6 if promised else None,
        peak_shares={"own loss": 0.6} if promised else {},
        peak_above=TRUNK,
    )
    trained = View("trainer", "a step of Trainer.train() with AdamW, 40 % padded")
    return [
        case_of(step, step_problem, sizes, device),
        case_of(trained, trainer_problem, sizes, device),
    ]
