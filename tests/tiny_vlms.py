"""Small random vision-language models and processors of every family, made from configurations, offline.

Widths differ between towers, grouped-query attention is on, tiles and patches are small, so that mixed-up dimensions
show; every weight is drawn larger than usual so that random models are not all of one opinion.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

FAMILIES = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "internvl")

CHAT = (
    "{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% for c in m['content'] %}{{ '<image>\n' if c['type'] == 'image' else c['text'] }}{% endfor %}"
    "{{ eos_token if m['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if c['type'] == 'image' else c['text'] }}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOL_CHAT = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{{ ':' if m['content'][0]['type'] == 'image' else ': ' }}"
    "{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
INTERN_CHAT = QWEN_CHAT.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\\n")
WORDS = "USER: ASSISTANT: Assistant: user assistant is there a cat in the image? yes no, two dogs on the red mat."
QWEN_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
INTERN_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
SMOL_TOKENS = ["<|im_start|>", "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
SMOL_TOKENS += [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]


def tokenizer(special: list[str] | dict[str, str], *, bos: str | None, eos: str, adds_bos: bool = False) -> Any:
    """A byte-level BPE tokenizer whose padding token has id 0.

    Args:
        special: its further tokens, or those by the names under which it has them.
    """
    named = special.values() if isinstance(special, dict) else special
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    tokens = list(dict.fromkeys(["<pad>", *([bos] if bos else []), eos, *named]))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator(
        [WORDS] * 40, trainers.BpeTrainer(vocab_size=420, special_tokens=tokens, initial_alphabet=sorted(alphabet))
    )
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        own.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, own.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token=bos, eos_token=eos, pad_token="<pad>", extra_special_tokens=special
    )


def llama(own: Any) -> Any:
    return LlamaConfig(
        vocab_size=len(own),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
    )


def clip(size: int) -> Any:
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=size,
        patch_size=8,
    )


def _llava() -> tuple[Any, Any]:
    own = tokenizer(["<image>"], bos="<s>", eos="</s>", adds_bos=True)
    config = LlavaConfig(
        vision_config=clip(32),
        text_config=llama(own),
        image_token_index=own.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=own,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT,
    )
    return LlavaForConditionalGeneration(config), processor


def _llava_next() -> tuple[Any, Any]:
    own = tokenizer(["<image>"], bos="<s>", eos="</s>", adds_bos=True)
    grid = [[16, 32], [32, 16], [32, 32], [16, 48], [48, 16]]
    config = LlavaNextConfig(
        vision_config=clip(16),
        text_config=llama(own),
        image_token_index=own.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=grid,
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=grid
        ),
        tokenizer=own,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT,
    )
    return LlavaNextForConditionalGeneration(config), processor


def _qwen(config_class: Any, network_class: Any, processor_class: Any, vision: dict[str, Any]) -> tuple[Any, Any]:
    own = tokenizer(QWEN_TOKENS, bos=None, eos="<|im_end|>")
    patch = vision["patch_size"]
    text = {
        "vocab_size": len(own),
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
        "pad_token_id": own.pad_token_id,
        "eos_token_id": own.eos_token_id,
    }
    if network_class is Qwen3VLForConditionalGeneration:
        text["head_dim"] = 12
    tokens = {
        f"{name}_token_id": own.convert_tokens_to_ids(token)
        for name, token in (
            ("image", "<|image_pad|>"),
            ("video", "<|video_pad|>"),
            ("vision_start", "<|vision_start|>"),
            ("vision_end", "<|vision_end|>"),
        )
    }
    config = config_class(text_config=text, vision_config=vision, **tokens)
    sizes: dict[str, Any] = {
        "patch_size": patch,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": (2 * patch) ** 2, "longest_edge": (12 * patch) ** 2},
    }
    video = Qwen3VLVideoProcessor if network_class is Qwen3VLForConditionalGeneration else Qwen2VLVideoProcessor
    processor = processor_class(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=own,
        video_processor=video(patch_size=patch, merge_size=2, temporal_patch_size=2),
        chat_template=QWEN_CHAT,
    )
    return network_class(config), processor


def _qwen2_vl() -> tuple[Any, Any]:
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 48,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return _qwen(Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor, vision)


def _qwen2_5_vl() -> tuple[Any, Any]:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 4,
        "out_hidden_size": 48,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    return _qwen(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, vision)


def _qwen3_vl() -> tuple[Any, Any]:
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 4,
        "out_hidden_size": 48,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    return _qwen(Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor, vision)


def _idefics3_parts(config_class: Any) -> tuple[Any, Any]:
    own = tokenizer(SMOL_TOKENS, bos="<|im_start|>", eos="<end_of_utterance>")
    config = config_class(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        text_config=llama(own),
        scale_factor=2,
        image_token_id=own.convert_tokens_to_ids("<image>"),
    )
    return own, config


IDEFICS_SIZES: dict[str, Any] = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}


def _idefics3() -> tuple[Any, Any]:
    own, config = _idefics3_parts(Idefics3Config)
    images = Idefics3ImageProcessor(**IDEFICS_SIZES)
    processor = Idefics3Processor(image_processor=images, tokenizer=own, image_seq_len=4, chat_template=SMOL_CHAT)
    return Idefics3ForConditionalGeneration(config), processor


def _smolvlm() -> tuple[Any, Any]:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessor, SmolVLMProcessor
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    own, config = _idefics3_parts(SmolVLMConfig)
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(**IDEFICS_SIZES),
        tokenizer=own,
        video_processor=SmolVLMVideoProcessor(**IDEFICS_SIZES),
        image_seq_len=4,
        chat_template=SMOL_CHAT,
    )
    return SmolVLMForConditionalGeneration(config), processor


def _internvl() -> tuple[Any, Any]:
    from transformers import GotOcr2ImageProcessor, InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor
    from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

    own = tokenizer(INTERN_TOKENS, bos=None, eos="<|im_end|>")
    text = llama(own).to_dict() | {"model_type": "qwen2"}
    config = InternVLConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        text_config=text,
        image_token_id=own.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    sizes = {"size": {"height": 32, "width": 32}}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(max_patches=4, **sizes),
        tokenizer=own,
        video_processor=InternVLVideoProcessor(**sizes),
        image_seq_length=4,
        chat_template=INTERN_CHAT,
    )
    return InternVLForConditionalGeneration(config), processor


MAKERS = {
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "internvl": _internvl,
}


def make(name: str, *, seed: int = 0) -> tuple[Any, Any]:
    """(network, processor) with random weights, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network, processor = MAKERS[name]()
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.6 / parameter[0].numel() ** 0.5)
    return network.eval(), processor


def write(name: str, folder: Path, *, seed: int = 0) -> Path:
    """A folder that `open_model` opens."""
    network, processor = make(name, seed=seed)
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """Smooth random colours: unlike noise, it survives resizing."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(small.numpy()).resize((width, height), Image.Resampling.BICUBIC)
