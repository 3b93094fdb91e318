"""One training step of DPO on a vision-language model: ours against TRL's DPOTrainer, on the same random LLaVA.

    python -m benchmarks.vlm_step                              576 image tokens a row
    python -m benchmarks.vlm_step --images 5                   2,880
    python -m benchmarks.vlm_step --size 7b --precision bf16   LLaVA-1.5-7B's shape, on a GPU

Same model, adapter, pictures, questions, answers of 64 tokens, batch and precision in one process; the two take turns,
one step each: loss, backward, AdamW. Batches are made beforehand for both (TRL's by its own collator), so that neither
is charged for reading pictures. Peak memory is that of a process each. One JSON object goes to stdout.

    trl         DPOTrainer's own loss on its own collator's batch: chosen and rejected rows below each other
    ours        the method's own loss: the picture and its question once, for both answers
    ours_apart  the same with every answer's row computed whole: what sharing saves
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.harness import log, machine, seconds, spread, versions
from mmalign.memory import peak_gb, resident_gb
from mmalign.reference import AdaptersOff
from vlm import adapters
from vlm.build import new_tokenizer
from vlm.conversations import Conversation, render
from vlm.methods import dpo
from vlm.models import Policy, VisionLanguageModel, open_model
from vlm.parts import PairBatch, Parts
from vlm.settings import VlmLoraSettings, VlmModelSettings

ROOT = Path(__file__).parent.parent
VARIANTS = ("trl", "ours", "ours_apart")
ANSWER = 64  # tokens
LR = 1e-5
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SIZES: dict[str, dict[str, dict[str, int]]] = {
    "tiny": {
        "vision": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
        "text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
        "rest": {"side": 56, "vocabulary": 1000},
    },
    "100m": {
        "vision": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8},
        "text": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12, "num_attention_heads": 8},
        "rest": {"side": 336, "vocabulary": 32000},
    },
    "7b": {
        "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        "text": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
        "rest": {"side": 336, "vocabulary": 32064},
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is the same for every variant."""

    size: str
    images: int
    pairs: int
    rank: int
    precision: str
    device: str


def write_model(case: Case, folder: Path) -> None:
    """A LLaVA of random weights with its processor."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    shape, tokenizer = SIZES[case.size], new_tokenizer()
    side = shape["rest"]["side"]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape["vision"], image_size=side, patch_size=14, projection_dim=64),
        text_config=LlamaConfig(
            **shape["text"], vocab_size=shape["rest"]["vocabulary"], max_position_embeddings=4096, pad_token_id=0
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(side // 14) ** 2,
    )
    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.precision]
    with torch.device(case.device):
        network = LlavaForConditionalGeneration(config)
    network.to(dtype).save_pretrained(folder)
    square = {"height": side, "width": side}
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)


def pairs(case: Case, model: VisionLanguageModel) -> list[tuple[Conversation, Conversation]]:
    """Random pictures, one question, and two answers of exactly `ANSWER` tokens."""
    side = SIZES[case.size]["rest"]["side"]
    words = ["red", "blue", "green", "circle", "square", "triangle", "left", "above", "there", "picture"]
    made = []
    for number in range(case.pairs):
        draw = np.random.default_rng(number)
        pictures = tuple(
            Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(case.images)
        )
        question = {
            "role": "user",
            "content": [{"type": "image"}] * case.images + [{"type": "text", "text": "describe the picture."}],
        }
        chance = random.Random(number)
        answers = [" ".join(chance.choices(words, k=ANSWER - 1)) for _ in range(2)]
        sides = [
            Conversation(messages=(question,), images=pictures, answer=text, place=f"pair {number}") for text in answers
        ]
        made.append((sides[0], sides[1]))
    counts = {int(model.encode(side).completion.sum()) for pair in made for side in pair}
    log(f"answers of {sorted(counts)} tokens")
    return made


class Ours:
    """The method's own loss, as the trainer takes its steps."""

    def __init__(self, case: Case, folder: Path, *, shared: bool = True) -> None:
        self.model = open_model(VlmModelSettings(path=str(folder), dtype=case.precision))  # type: ignore[arg-type]
        if not shared:
            self.model.unshared = "measured so"
        adapters.add_lora(self.model.network, self.model.family, VlmLoraSettings(rank=case.rank))
        self.model.to(case.device).network.train()
        self.module = Policy(self.model)
        reference = AdaptersOff(self.module, lambda: adapters.adapters_disabled(self.model.network))
        parts = Parts(module=self.module, model=self.model, reference=reference)
        self.method = dpo.build(dpo.Options(beta=0.1), parts)
        sides = pairs(case, self.model)
        self.batch = PairBatch(
            views={
                "chosen": tuple(self.model.encode(chosen) for chosen, _ in sides),
                "rejected": tuple(self.model.encode(rejected) for _, rejected in sides),
            },
            device=torch.device(case.device),
        )
        self.parameters = [p for p in self.model.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR)
        self.losses: list[float] = []

    def loss(self) -> Tensor:
        return next(iter(self.method.losses(self.batch)))[0]

    def step(self) -> None:
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())


class Trl:
    """`DPOTrainer` with its own collator; only its loop is left out."""

    def __init__(self, case: Case, folder: Path) -> None:
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import AutoModelForImageTextToText
        from trl import DPOConfig, DPOTrainer
        from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

        ours = open_model(VlmModelSettings(path=str(folder), dtype=case.precision))  # type: ignore[arg-type]
        pattern = adapters.target_pattern(ours.network, ours.family, VlmLoraSettings(rank=case.rank))
        rows = []
        for chosen, rejected in pairs(case, ours):
            good, bad = (render(side, ours.processor, ours.template) for side in (chosen, rejected))
            rows.append(
                {
                    "images": list(chosen.images),
                    "prompt": f"{ours.processor.tokenizer.bos_token}{good.prompt}",
                    "chosen": good.completion,
                    "rejected": bad.completion,
                }
            )
        dtype = ours.network.dtype
        empty = {"prompt": "a", "chosen": "b", "rejected": "c", "images": []}
        with tempfile.TemporaryDirectory() as out:
            self.trainer: Any = DPOTrainer(
                model=AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype),
                args=DPOConfig(
                    output_dir=out,
                    per_device_train_batch_size=case.pairs,
                    beta=0.1,
                    max_length=None,
                    use_cpu=case.device == "cpu",
                    bf16=case.precision == "bf16",
                    gradient_checkpointing=False,
                    report_to=[],
                    disable_tqdm=True,
                ),
                train_dataset=Dataset.from_list([empty] * case.pairs),
                processing_class=ours.processor,
                peft_config=LoraConfig(r=case.rank, lora_alpha=case.rank, target_modules=pattern),
            )
        self.batch = DataCollatorForVisionPreference(ours.processor)(rows).to(case.device)
        del ours
        self.network: Any = self.trainer.model.to(case.device)
        self.network.train()
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR)
        self.losses: list[float] = []

    def step(self) -> None:
        with self.trainer.compute_loss_context_manager():
            loss = self.trainer._compute_loss(self.network, self.batch, False)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())


def build(name: str, case: Case, folder: Path) -> Ours | Trl:
    """A variant by name."""
    return Trl(case, folder) if name == "trl" else Ours(case, folder, shared=name == "ours")


def time_steps(case: Case, folder: Path, rounds: int, names: Sequence[str]) -> dict[str, Any]:
    """Seconds a step of each variant, in turns."""
    device = torch.device(case.device)
    variants = {name: build(name, case, folder) for name in names}
    for variant in variants.values():
        variant.step()
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = list(names) if number % 2 == 0 else list(reversed(names))
        for name in turn:
            times[name].append(seconds(variants[name].step, device))
        log(f"round {number + 1} of {rounds}:", ", ".join(f"{name} {times[name][-1]:.2f} s" for name in names))
    return {
        name: {
            "seconds": spread(values),
            "pairs_per_second": case.pairs / spread(values)["median"],
            "losses": variants[name].losses[:3],
        }
        for name, values in times.items()
    }


def memory_of(name: str, case: Case, folder: Path) -> dict[str, float]:
    """Peak memory of this process over two steps of a variant."""
    imports = resident_gb()
    variant = build(name, case, folder)
    before = peak_gb(torch.device(case.device))
    for _ in range(2):
        variant.step()
    return {"imports_gb": imports, "built_gb": before, "peak_gb": peak_gb(torch.device(case.device))}


def parameters(folder: Path) -> int:
    """Weights of the model."""
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            total += sum(int(np.prod(opened.get_slice(key).get_shape())) for key in opened.keys())  # noqa: SIM118
    return total


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="100m")
    parser.add_argument("--images", type=int, default=1, help="pictures a row; 576 tokens each")
    parser.add_argument("--pairs", type=int, default=2, help="in a batch")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    said = parser.parse_args()
    warnings.simplefilter("ignore")
    case = Case(
        size=said.size,
        images=said.images,
        pairs=said.pairs,
        rank=said.rank,
        precision=said.precision,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    if said.memory_of:
        print(json.dumps(memory_of(said.memory_of, case, said.folder)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        write_model(case, folder)
        about = machine(torch.device(case.device))
        memory = {name: apart(name, case, folder) for name in VARIANTS}
        timed = time_steps(case, folder, said.rounds, VARIANTS)
        count = parameters(folder)
    result: dict[str, Any] = {"case": {**asdict(case), "parameters": count, "answer": ANSWER}, "machine": about}
    result["versions"] = versions()
    result["variants"] = {name: {**timed[name], **memory[name]} for name in VARIANTS}
    base, own = result["variants"]["trl"], result["variants"]["ours"]
    result["ratios"] = {
        "pairs_per_second": own["pairs_per_second"] / base["pairs_per_second"],
        "peak_gb": own["peak_gb"] / base["peak_gb"],
        "peak_beyond_imports": (own["peak_gb"] - own["imports_gb"]) / (base["peak_gb"] - base["imports_gb"]),
    }
    print(json.dumps(result, indent=1))
    return 0


def apart(name: str, case: Case, folder: Path) -> dict[str, float]:
    """`memory_of` in a process of its own."""
    words = ["--memory-of", name, "--folder", str(folder), "--size", case.size, "--images", str(case.images)]
    words += ["--pairs", str(case.pairs), "--rank", str(case.rank), "--precision", case.precision]
    command = [sys.executable, "-m", "benchmarks.vlm_step", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    log(f"{name}: peak {found['peak_gb']:.2f} GB, {found['imports_gb']:.2f} of imports")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
