# SPDX-License-Identifier: BSD-3-Clause
"""The plugin under axolotl's own plugin manager, arguments and trainer: weights by hand."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from places import place

pytestmark = pytest.mark.slow
place("transformers", "axolotl", "peft", "numba", "datasets")

import axolotl  # noqa: E402
from axolotl.core.trainers.base import AxolotlTrainer  # noqa: E402
from axolotl.core.training_args_base import AxolotlTrainingMixins  # noqa: E402
from axolotl.integrations.base import PluginManager  # noqa: E402
from axolotl.integrations.config import merge_input_args  # noqa: E402
from axolotl.utils.dict import DictDefault  # noqa: E402
from datasets import Dataset  # noqa: E402
from tiny_models import (  # noqa: E402
    LEARNING_RATE,
    LOGGED,
    Collator,
    logged,
    make_model,
    make_rows,
    trained_by_hand,
    weights,
)
from transformers import TrainingArguments  # noqa: E402

from masked_loss_ext.integrations import axolotl as ours  # noqa: E402
from masked_loss_ext.integrations.transformers import MaskLabels  # noqa: E402

PLUGIN = "masked_loss_ext.integrations.axolotl.MaskedLossPlugin"
ROUNDING = dict(rtol=1e-12, atol=1e-13)


@dataclasses.dataclass
class AxolotlTrainingArguments(AxolotlTrainingMixins, TrainingArguments):
    """As axolotl's of that name, which its release cannot import beside a newer TRL."""


@pytest.fixture
def manager():
    """axolotl's, with this plugin in it."""
    PluginManager._instance = None
    found = PluginManager.get_instance()
    found.register(PLUGIN)  # says what is wrong and goes on
    assert list(found.plugins) == [PLUGIN]
    yield found
    PluginManager._instance = None


def trained(manager, directory, cfg, batch, accumulate, with_plugin=True):
    """(model, trainer) as axolotl's train makes them: build, plugins, trainer, plugins."""
    model = make_model("llama")
    if with_plugin:
        manager.post_model_build(cfg, model)
    arguments = AxolotlTrainingArguments(
        output_dir=str(directory), per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate, max_steps=1, learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant", max_grad_norm=0.0, optim="sgd", logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, model_type="llama",
        remove_unused_columns=False, sample_packing=False,
    )  # fmt: skip
    rows = Dataset.from_list([{"input_ids": x["input_ids"].tolist()} for x in make_rows()])
    trainer = AxolotlTrainer(
        model=model, args=arguments, train_dataset=rows.with_format("torch"),
        data_collator=MaskLabels(Collator()),
    )  # fmt: skip
    if with_plugin:
        manager.post_trainer_create(cfg, trainer)
    trainer.train()
    return model, trainer


@pytest.mark.parametrize("way", [None, "logits", "logit_free"])
def test_one_step_of_eight_is_two_of_four_is_eight_of_one(manager, way, tmp_path):
    loss, expected = trained_by_hand("llama", make_rows())
    for batch, accumulate in ((8, 1), (4, 2), (1, 8)):
        model, trainer = trained(manager, tmp_path, DictDefault(masked_loss=way), batch, accumulate)
        torch.testing.assert_close(weights(model), expected, **ROUNDING)
        torch.testing.assert_close(logged(trainer, "loss"), [loss], **LOGGED)
        ids = make_rows()[0]["input_ids"][None]
        outputs = model.train()(input_ids=ids, labels=ids)
        assert (outputs.logits is None) == (way != "logits")


def test_without_the_plugin_micro_batches_weigh_alike(manager, tmp_path):
    """What the test before would see if the count were not handed over."""
    _, expected = trained_by_hand("llama", make_rows())
    model, _ = trained(manager, tmp_path, DictDefault(), 4, 2, with_plugin=False)
    assert (weights(model) - expected).abs().max() > 1e-3


def test_arguments_of_the_yaml_file(manager):
    """Merged by axolotl itself into the schema that it validates a file by."""
    assert manager.get_input_args() == ["masked_loss_ext.integrations.axolotl.MaskedLossArgs"]
    with_capabilities, plain = merge_input_args()
    for schema in (with_capabilities, plain):
        fields = schema.model_fields
        assert fields["masked_loss"].default == "logit_free"
        assert "masked_loss_options" in fields
    with pytest.raises(ValueError, match="masked_loss"):
        ours.MaskedLossArgs(masked_loss="logitfree")


def test_options_and_refusals(manager):
    model = make_model("llama").train()
    cfg = DictDefault(masked_loss="logit_free", masked_loss_options={"z_loss": 0.5})
    batch = MaskLabels(Collator())(make_rows())
    plain = model(**batch).loss
    manager.post_model_build(cfg, model)
    assert model(**batch).loss > plain + 0.1
    with pytest.raises(TypeError, match="z_los"):
        ours.MaskedLossPlugin().post_model_build(
            DictDefault(masked_loss_options={"z_los": 1.0}), make_model("llama")
        )
    for name in ("cut_cross_entropy", "liger_fused_linear_cross_entropy", "chunked_cross_entropy"):
        with pytest.raises(ValueError, match=f"only one that makes the loss, got {name} beside"):
            manager.post_model_build(DictDefault({name: True}), make_model("llama"))
    with pytest.raises(ValueError, match="masked_loss must be one of .*, got words"):
        manager.post_model_build(DictDefault(masked_loss="words"), make_model("llama"))


def test_names_are_axolotls():
    """Each setting that is looked for is a field of axolotl's or of one of its plugins'."""
    folder = Path(axolotl.__path__[0])
    files = [*folder.glob("utils/schemas/**/*.py"), *folder.glob("integrations/*/args.py")]
    text = "".join(file.read_text() for file in files)
    for name in ours._OTHERS:
        assert re.search(rf"^    {name}: ", text, re.MULTILINE), name
