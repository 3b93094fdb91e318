"""The same pairs through TRL's DPOTrainer, on the same tiny LLaVA: equal log-probabilities, loss and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_talks import Talk

from mmalign.pairdata import PairDataSettings, read_pairs
from mmalign.reference import AdaptersOff
from vlm import adapters
from vlm.conversations import conversations, render
from vlm.methods import dpo
from vlm.models import Policy, VisionLanguageModel, open_model
from vlm.parts import PairBatch, Parts, under
from vlm.settings import VlmLoraSettings, VlmModelSettings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of TRL's own making
]


def wake(named: dict[str, torch.nn.Parameter]) -> None:
    """Move the adapter from where it starts, so that policy and reference differ; alike for equal names."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in sorted(named):
            if ".lora_" in name:
                named[name].copy_(0.1 * torch.randn(named[name].shape, generator=generator))


def plain_names(network: Any) -> dict[str, torch.nn.Parameter]:
    return {name.replace("base_model.model.", ""): p for name, p in network.named_parameters() if p.requires_grad}


def their_trainer(model: VisionLanguageModel, folder: Path, count: int) -> Any:
    """TRL's trainer on the same base with an adapter of the same shape."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText
    from trl import DPOConfig, DPOTrainer

    own: LoraConfig = model.network.peft_config["default"]
    arguments = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=count,
        beta=0.1,
        max_length=None,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
    )
    return DPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(model.settings.path, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c", "images": []}] * count),
        processing_class=model.processor,
        peft_config=LoraConfig(r=own.r, lora_alpha=own.lora_alpha, target_modules=own.target_modules),
    )


def test_equal_to_trl(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is a development dependency")
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    talk = Talk(tmp_path / "talk")
    model = open_model(VlmModelSettings(path=str(talk.model)))
    adapters.add_lora(model.network, model.family, VlmLoraSettings(rank=4))
    pairs, _ = read_pairs(PairDataSettings(path=talk.store), 0)
    sides = [conversations(pair) for pair in pairs]
    bos = model.processor.tokenizer.bos_token
    rows = []
    for chosen, rejected in sides:
        good, bad = (render(side, model.processor, model.template) for side in (chosen, rejected))
        prompt = good.prompt if bos is None or good.prompt.startswith(bos) else bos + good.prompt
        rows.append(
            {"images": list(chosen.images), "prompt": prompt, "chosen": good.completion, "rejected": bad.completion}
        )
    trainer = their_trainer(model, tmp_path, len(rows))
    theirs, inputs = trainer.model, DataCollatorForVisionPreference(model.processor)(rows)
    theirs.train()
    wake(plain_names(theirs))
    their_loss = trainer._compute_loss(theirs, inputs, False)
    their_loss.backward()
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    arguments = {name: tensor for name, tensor in inputs.items() if name != "completion_mask"}
    with torch.no_grad():
        made = theirs(**arguments, labels=labels, fused_lm_head=True, use_cache=False)
    their_logps = made.log_probs.sum(1)

    # ours, both answers beside the chosen picture as TRL has them
    wake(plain_names(model.network))
    module = Policy(model)
    reference = AdaptersOff(module, lambda: adapters.adapters_disabled(model.network))
    method = dpo.build(dpo.Options(images="chosen"), Parts(module=module, model=model, reference=reference))
    batch = PairBatch(
        views={
            "chosen": tuple(model.encode(chosen) for chosen, _ in sides),
            "rejected": tuple(model.encode(under(rejected, chosen.images, "")) for chosen, rejected in sides),
        },
        device=torch.device("cpu"),
    )
    loss, metrics = next(iter(method.losses(batch)))
    loss.backward()
    with torch.no_grad():
        logps = module(model.answers([*batch.views["chosen"], *batch.views["rejected"]]))[0].sum(1)
    torch.testing.assert_close(logps, their_logps, rtol=1e-5, atol=1e-4)
    assert float(metrics["rewards/margins_abs"]) > 0.01  # policy and reference do differ
    assert abs(float(loss.detach()) - float(their_loss.detach())) < 1e-5
    ours_named, theirs_named = plain_names(model.network), plain_names(theirs)
    assert ours_named.keys() == theirs_named.keys() and len(ours_named) > 4
    for name, parameter in ours_named.items():
        assert parameter.grad is not None and parameter.grad.any()
        torch.testing.assert_close(parameter.grad, theirs_named[name].grad, rtol=1e-3, atol=1e-5)
