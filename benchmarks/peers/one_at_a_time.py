"""Retrieval as in published scripts of long-text models: one image and one caption at a time, then argmax.

python one_at_a_time.py SHARD MODEL WEIGHTS
"""

import io
import sys
import tarfile

import open_clip
import torch
from PIL import Image
from torch.nn.functional import normalize


@torch.no_grad()
def main(shard: str, name: str, weights: str) -> None:
    """Prints R@1 of image to text and of text to image, as fractions."""
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=weights)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()
    images, texts = [], []
    with tarfile.open(shard) as tar:
        for member in tar:
            content = tar.extractfile(member).read()
            if member.name.endswith(".jpg"):
                pixels = preprocess(Image.open(io.BytesIO(content)).convert("RGB"))[None]
                images.append(normalize(model.encode_image(pixels), dim=-1))
            else:
                texts.append(normalize(model.encode_text(tokenizer([content.decode()])), dim=-1))
    similarity = torch.cat(images) @ torch.cat(texts).T
    own = torch.arange(len(images))
    print(float((similarity.argmax(1) == own).float().mean()), float((similarity.argmax(0) == own).float().mean()))


if __name__ == "__main__":
    main(*sys.argv[1:])
