"""Exports one ONNX file per tower, for onnxruntime without PyTorch: pixels or token ids -> normalised features."""

import logging
import warnings
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import text_global_pool
from torch import nn

from training.export.source import Source, check_samples
from training.export.tokenizer_files import write_tokenizer

OPSET = 18
MAX_BATCH = 2**20  # torch 2.6 cannot export an axis without an upper bound


class _Images(nn.Module):
    model: Any  # open_clip's or one of ours

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(pixels, normalize=True)


class _Texts(_Images):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        model = self.model
        if not isinstance(model, open_clip.CLIP):
            return model.encode_text(ids, normalize=True)
        # `CLIP.encode_text` for rows of any length; the original supports only the full context length.
        places = torch.arange(ids.shape[1])  # slices would make torch 2.6 treat the full length as a case of its own
        hidden = model.token_embedding(ids) + model.positional_embedding[places]
        hidden = model.ln_final(model.transformer(hidden, attn_mask=model.attn_mask[places][:, places]))
        pooled = text_global_pool(hidden, ids, model.text_pool_type, eos_token_id=model.text_eos_id)
        projection = model.text_projection
        pooled = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
        return nn.functional.normalize(pooled, dim=-1)


def write_onnx(source: Source, folder: Path) -> dict[str, torch.Tensor]:
    """Writes ``image.onnx``, ``text.onnx`` and the tokenizer.

    Returns:
        The features of the samples, computed by onnxruntime, as ``image`` and ``text``.

    Raises:
        ValueError: onnx or onnxruntime is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError("--to onnx needs more packages: pip install onnx onnxscript onnxruntime") from error
    images, texts = check_samples()
    pixels = torch.stack([source.preprocess(image) for image in images])
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    # A text tower without causal mask that pools its last position only works with the full context length.
    fixed = getattr(getattr(source.model, "text", source.model), "pool_type", "") == "last"
    length = source.tokenizer.context_length
    text_axes = {0: batch} if fixed else {0: batch, 1: torch.export.Dim("length", min=4, max=length)}
    ids = source.tokenizer(texts[:2])
    _export(_Images(source.model), pixels[:2], {0: batch}, folder / "image.onnx", "pixel_values")
    _export(_Texts(source.model), ids if fixed else ids[:, :-1], text_axes, folder / "text.onnx", "input_ids")
    tokenizer = write_tokenizer(source, folder)
    rows = tokenizer(texts, padding="max_length" if fixed else True, truncation=True, max_length=length)
    inputs = {"image": pixels.numpy(), "text": torch.tensor(rows.input_ids).numpy()}
    found = {}
    for kind, values in inputs.items():
        session = onnxruntime.InferenceSession(str(folder / f"{kind}.onnx"), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        parts = [session.run(None, {name: part})[0] for part in (values[:5], values[5:])]  # two batch sizes
        found[kind] = torch.cat([torch.from_numpy(part) for part in parts])
    return found


def _export(tower: nn.Module, example: torch.Tensor, axes: dict, path: Path, name: str) -> None:
    was_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fast path can't be exported to ONNX
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # deprecation warnings of the exporter itself
            torch.onnx.export(
                tower.eval(),
                (example,),
                str(path),
                dynamo=True,
                external_data=False,
                verbose=False,
                opset_version=OPSET,
                input_names=[name],
                output_names=["features"],
                dynamic_shapes=(axes,),
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fast)
        logging.disable(logging.NOTSET)
