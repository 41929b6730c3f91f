"""Vision-language models behind one method: images and a prompt in, one text each out.

Both engines decode greedily, so that the same model gives the same captions.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image

from training.runtime.messages import first_line

# What each is for is said in TRAIN_DATASETS.md; how the published captions were asked for is not published with them.
PROMPTS = {
    "detailed": "Describe the image in detail.",
    "short": "Describe the image in one sentence.",
    "visible": (
        "Describe everything that can be seen in this image in one paragraph of plain sentences: objects, how many, "
        "their colours, places and actions, readable text, and the background. Do not guess what cannot be seen."
    ),
}


class Generated(NamedTuple):
    """What a model wrote.

    Attributes:
        text: without special tokens.
        complete: it came to an end by itself, before the most tokens it was allowed.
    """

    text: str
    complete: bool


class Engine(Protocol):
    """What `recaption` needs of a model.

    Attributes:
        batch_size: images it works well with at once.
    """

    batch_size: int

    def caption(self, images: Sequence[Image.Image], prompt: str) -> list[Generated]:
        """Answers the prompt for each RGB image."""


def make_engine(
    name: str,
    vlm: str,
    max_tokens: int,
    device: str | None,
    tensor_parallel: int,
    cache_dir: str | None,
    vllm_args: Mapping[str, Any] | None = None,
) -> Engine:
    """Loads a model.

    Args:
        name: ``vllm``, ``transformers``, or ``auto``: the first if it is installed.
        vlm: folder or hub name.
        max_tokens: most tokens of a caption.
        device: for transformers; None takes a GPU if there is one.
        tensor_parallel: GPUs that share one model, with vLLM.
        cache_dir: where downloads are kept.
        vllm_args: more arguments of `vllm.LLM`.

    Raises:
        FileNotFoundError: no such model, or it is not one that reads images.
        ValueError: vLLM is asked for and not installed, or can't be run so.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if name == "vllm" and not installed:
        raise ValueError("--engine vllm: not installed; pip install vllm, or take --engine transformers")
    if name == "vllm" or (name == "auto" and installed):
        return VllmEngine(vlm, max_tokens, tensor_parallel, cache_dir, vllm_args or {})
    if tensor_parallel > 1:
        raise ValueError(f"--tensor-parallel {tensor_parallel}: needs vLLM (pip install vllm)")
    if vllm_args:
        raise ValueError("--vllm-args: needs vLLM (pip install vllm, --engine vllm)")
    return TransformersEngine(vlm, max_tokens, device, cache_dir)


def own_device(device: str | None) -> torch.device:
    """The device of this process: with several on one machine each takes its own GPU."""
    if device or not torch.cuda.is_available():
        return torch.device(device or "cpu")
    rank = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    return torch.device("cuda", rank % torch.cuda.device_count())


class TransformersEngine:
    """Any model of `AutoModelForImageTextToText`: InstructBLIP, LLaVA, Qwen-VL, InternVL, ..

    Args:
        vlm: folder or hub name; code that lies there is not run.
        max_tokens: most tokens of a caption.
        device: None takes a GPU if there is one.
        cache_dir: where downloads are kept.

    Raises:
        FileNotFoundError: no such model, or none that reads images.
    """

    batch_size = 32

    def __init__(self, vlm: str, max_tokens: int, device: str | None, cache_dir: str | None):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.device = own_device(device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        try:
            self.processor = AutoProcessor.from_pretrained(vlm, cache_dir=cache_dir)
            model = AutoModelForImageTextToText.from_pretrained(vlm, dtype=dtype, cache_dir=cache_dir)
        except (OSError, ValueError, KeyError) as error:
            raise FileNotFoundError(
                f"--vlm {vlm}: can't be loaded as a vision-language model ({first_line(error)}); expected a folder or "
                f"hub name with config.json, weights and processor"
            ) from error
        self.model = model.to(self.device).eval()
        self.dtype, self.max_tokens = dtype, max_tokens
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"  # what is written must follow the prompt at once
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        ends = model.generation_config.eos_token_id
        self.end_ids = set(ends if isinstance(ends, list) else [ends]) | {self.tokenizer.eos_token_id}

    def caption(self, images: Sequence[Image.Image], prompt: str) -> list[Generated]:
        """As `Engine.caption`."""
        text = self._with_image(prompt)
        inputs = self.processor(images=list(images), text=[text] * len(images), return_tensors="pt", padding=True)
        inputs = inputs.to(self.device, self.dtype)
        with torch.inference_mode():
            ids = self.model.generate(
                **inputs,
                max_new_tokens=self.max_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        # Most models give the prompt back first, some only what they wrote.
        length = inputs["input_ids"].shape[1]
        if ids.shape[1] >= length and torch.equal(ids[:, :length], inputs["input_ids"]):
            ids = ids[:, length:]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [Generated(text.strip(), self._has_end(row)) for text, row in zip(texts, ids.tolist())]

    def _has_end(self, row: list[int]) -> bool:
        """The first token may be a start that looks like an end (OPT's does)."""
        nothing = set(row) <= self.end_ids | {self.tokenizer.pad_token_id}
        return nothing or any(token in self.end_ids for token in row[1:])

    def _with_image(self, prompt: str) -> str:
        """The prompt in the model's own form."""
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            turns = [{"role": "user", "content": content}]
            return self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        if "Blip" in type(self.processor).__name__:
            return prompt  # it puts its image tokens in by itself
        token = getattr(self.processor, "image_token", None)
        return f"{token}\n{prompt}" if token else prompt


class VllmEngine:
    """A model under vLLM, which batches by itself and may spread one model over several GPUs.

    Args:
        vlm: folder or hub name.
        max_tokens: most tokens of a caption.
        tensor_parallel: GPUs that share the model.
        cache_dir: where downloads are kept.
        vllm_args: more arguments of `vllm.LLM`; they go before what is set here.

    Raises:
        ValueError: started by torchrun, whose process group vLLM would take for its own.
    """

    batch_size = 512  # vLLM makes its own batches out of these, 256 at a time by default

    def __init__(
        self, vlm: str, max_tokens: int, tensor_parallel: int, cache_dir: str | None, vllm_args: Mapping[str, Any]
    ):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                "--engine vllm under torchrun: start one process per model with srun or a SLURM array instead, or by "
                "hand with CUDA_VISIBLE_DEVICES and --shard-range"
            )
        from vllm import LLM, SamplingParams

        ours = {
            "tensor_parallel_size": tensor_parallel,
            "limit_mm_per_prompt": {"image": 1},
            "download_dir": cache_dir,
            "seed": 0,
        }
        try:
            self.llm = LLM(model=vlm, **ours | dict(vllm_args))
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"--vlm {vlm}: vLLM can't load it ({first_line(error)}); see also --vllm-args") from error
        self.sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)

    def caption(self, images: Sequence[Image.Image], prompt: str) -> list[Generated]:
        """As `Engine.caption`."""
        conversations = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": prompt}],
                }
            ]
            for image in images
        ]
        answers = self.llm.chat(conversations, self.sampling, use_tqdm=False)
        return [Generated(a.outputs[0].text.strip(), a.outputs[0].finish_reason != "length") for a in answers]
