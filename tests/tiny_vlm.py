"""A tiny LLaVA with random weights and its own vocabulary, saved in the usual format."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BlipImageProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = "a the one red blue green big small dog cat house tree car sky sits runs stands on under near is has and ,"
PROMPT_WORDS = "USER: ASSISTANT: Describe this image in detail one sentence <image> <pad> <s> </s> <unk>"
TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m.content %}"
    "{% if c.type == 'image' %}<image> {% else %}{{ c.text }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def save_tiny_vlm(folder: Path, seed: int, template: bool = True) -> Path:
    """Saves model and processor; different seeds give different models."""
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(f"{PROMPT_WORDS} {WORDS}".split()))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("<image>", "isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(images, tokenizer, patch_size=8, vision_feature_select_strategy="full")
    processor.chat_template = TEMPLATE if template else None
    processor.num_additional_image_tokens = 1
    vision = CLIPVisionConfig(
        image_size=16, patch_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=vocabulary["</s>"],
        bos_token_id=vocabulary["<s>"],
        pad_token_id=vocabulary["<pad>"],
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=vocabulary["<image>"],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    return _save(model, processor, vocabulary, folder)


def save_tiny_instructblip(folder: Path) -> Path:
    """Saves an InstructBLIP: a Q-Former between image and text, no chat template, image tokens from the processor."""
    words = dict.fromkeys(f"<pad> <s> </s> <unk> <image> {PROMPT_WORDS} {WORDS}".split())
    vocabulary = {word: number for number, word in enumerate(words)}

    def tokenizer(**special: str) -> PreTrainedTokenizerFast:
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        return PreTrainedTokenizerFast(tokenizer_object=backend, **names, **special)

    images = BlipImageProcessor(size={"height": 16, "width": 16})
    processor = InstructBlipProcessor(images, tokenizer(), tokenizer(), num_query_tokens=3)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = InstructBlipConfig(
        vision_config=small | {"image_size": 16, "patch_size": 8},
        qformer_config=small | {"vocab_size": len(processor.qformer_tokenizer), "encoder_hidden_size": 16},
        text_config=LlamaConfig(vocab_size=len(processor.tokenizer), **small, tie_word_embeddings=False).to_dict(),
        num_query_tokens=3,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = InstructBlipForConditionalGeneration(config).eval()
    return _save(model, processor, vocabulary, folder)


def _save(model: torch.nn.Module, processor, vocabulary: dict[str, int], folder: Path) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.5)  # with less, it gives the same answer for every image
    model.generation_config.eos_token_id = vocabulary["</s>"]
    model.generation_config.pad_token_id = vocabulary["<pad>"]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
