"""Vision-language models behind one method, which returns a text for each image and a prompt.

Both engines decode greedily, so the same model gives the same captions.
"""

import argparse
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image

from training.runtime.messages import first_line


class Generated(NamedTuple):
    """The answer of a model.

    Attributes:
        text: the text without special tokens.
        complete: the model ended the text itself, before the maximum number of tokens.
    """

    text: str
    complete: bool


def make_engine(args: argparse.Namespace) -> "TransformersEngine | VllmEngine":
    """Loads the model that the flags name.

    Raises:
        FileNotFoundError: there is no such model, or it doesn't read images.
        ValueError: vLLM is needed and not installed, or can't run with these flags.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if args.engine == "vllm" or (args.engine == "auto" and installed):
        if not installed:
            raise ValueError("--engine vllm: not installed; pip install vllm, or use --engine transformers")
        return VllmEngine(args.vlm, args.max_tokens, args.tensor_parallel, args.cache_dir, args.vllm_args or {})
    for flag, given in (("--tensor-parallel", args.tensor_parallel > 1), ("--vllm-args", args.vllm_args)):
        if given:
            raise ValueError(f"{flag}: needs vLLM (pip install vllm, --engine vllm)")
    return TransformersEngine(args.vlm, args.max_tokens, args.device, args.cache_dir)


def device_of_process(device: str | None) -> torch.device:
    """Returns the device of this process; several processes on one machine use different GPUs."""
    if device or not torch.cuda.is_available():
        return torch.device(device or "cpu")
    rank = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    return torch.device("cuda", rank % torch.cuda.device_count())


class TransformersEngine:
    """Any model of `AutoModelForImageTextToText`, such as InstructBLIP, LLaVA, Qwen-VL or InternVL.

    Args:
        vlm: folder, or name on the hub; code in it is not executed.
        max_tokens: maximum number of tokens of a caption.
        device: None means a GPU if there is one.
        cache_dir: folder for downloads.

    Raises:
        FileNotFoundError: there is no such model, or it doesn't read images.
    """

    batch_size = 32

    def __init__(self, vlm: str, max_tokens: int, device: str | None, cache_dir: str | None):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.device = device_of_process(device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        try:
            self.processor = AutoProcessor.from_pretrained(vlm, cache_dir=cache_dir)
            model = AutoModelForImageTextToText.from_pretrained(vlm, dtype=dtype, cache_dir=cache_dir)
        except (OSError, ValueError, KeyError) as error:
            found = f"can't be loaded as a vision-language model ({first_line(error)})"
            expected = "expected a folder or hub name with config.json, weights and processor"
            raise FileNotFoundError(f"--vlm {vlm}: {found}; {expected}") from error
        self.model = model.to(self.device).eval()  # type: ignore[arg-type]  # transformers wraps `to`
        self.dtype, self.max_tokens = dtype, max_tokens
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"  # the answer must follow the prompt directly
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        ends = model.generation_config.eos_token_id
        self.no_text = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id}
        self.no_text.add(self.tokenizer.pad_token_id)

    def caption(self, images: Sequence[Image.Image], prompt: str) -> list[Generated]:
        """Returns the answer to the prompt for each RGB image."""
        text = self._with_image(prompt)
        inputs = self.processor(images=list(images), text=[text] * len(images), return_tensors="pt", padding=True)
        inputs = inputs.to(self.device, self.dtype)
        with torch.inference_mode():
            how = {"max_new_tokens": self.max_tokens, "pad_token_id": self.tokenizer.pad_token_id}
            ids = self.model.generate(**inputs, do_sample=False, num_beams=1, **how)
        # Most models return the prompt before their answer, some only the answer.
        length = inputs["input_ids"].shape[1]
        if ids.shape[1] >= length and torch.equal(ids[:, :length], inputs["input_ids"]):
            ids = ids[:, length:]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        # A model that ended the text itself has written fewer tokens than it might, besides those of begin and end.
        complete = [sum(token not in self.no_text for token in row) < self.max_tokens for row in ids.tolist()]
        return [Generated(text.strip(), whole) for text, whole in zip(texts, complete)]

    def _with_image(self, prompt: str) -> str:
        """Returns the prompt in the model's own format."""
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            turns = [{"role": "user", "content": content}]
            return self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        if "Blip" in type(self.processor).__name__:
            return prompt  # the processor inserts the image tokens itself
        token = getattr(self.processor, "image_token", None)
        return f"{token}\n{prompt}" if token else prompt


class VllmEngine:
    """A model in vLLM, which makes its own batches and can spread one model over several GPUs.

    Args:
        vlm: folder, or name on the hub.
        max_tokens: maximum number of tokens of a caption.
        tensor_parallel: number of GPUs that share the model.
        cache_dir: folder for downloads.
        vllm_args: further arguments of `vllm.LLM`; they override the ones set here.

    Raises:
        ValueError: vLLM can't load the model, or the process was started by torchrun, whose process group vLLM would
            use as its own.
    """

    batch_size = 512  # vLLM makes its own batches of these, by default 256

    def __init__(
        self, vlm: str, max_tokens: int, tensor_parallel: int, cache_dir: str | None, vllm_args: Mapping[str, Any]
    ):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            remedy = "start one process per model with srun, a SLURM array, or by hand with --shard-range"
            raise ValueError(f"--engine vllm under torchrun: {remedy}")
        from vllm import LLM, SamplingParams

        usual = {"limit_mm_per_prompt": {"image": 1}, "download_dir": cache_dir, "seed": 0}
        usual |= {"tensor_parallel_size": tensor_parallel}
        try:
            self.llm = LLM(model=vlm, **usual | dict(vllm_args))
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"--vlm {vlm}: vLLM can't load it ({first_line(error)}); see also --vllm-args") from error
        self.sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)

    def caption(self, images: Sequence[Image.Image], prompt: str) -> list[Generated]:
        """Returns the answer to the prompt for each RGB image."""
        question = {"type": "text", "text": prompt}
        turns = [{"role": "user", "content": [{"type": "image_pil", "image_pil": i}, question]} for i in images]
        answers = self.llm.chat([[turn] for turn in turns], self.sampling, use_tqdm=False)
        return [Generated(a.outputs[0].text.strip(), a.outputs[0].finish_reason != "length") for a in answers]
