"""The names and signatures that we borrow from open_clip: a release that moves one fails here, with its name."""

import inspect

import open_clip
import open_clip.tokenizer
import open_clip_train.distributed
import open_clip_train.precision
import pytest

BORROWED = [
    (open_clip.create_model_and_transforms, ["model_name", "pretrained", "precision", "device", "cache_dir"]),
    (open_clip.create_model, ["load_weights", "pretrained_text", "pretrained_image", "output_dict", "cache_dir"]),
    (open_clip.get_tokenizer, ["model_name", "cache_dir"]),
    (open_clip.load_checkpoint, ["model", "checkpoint_path", "strict", "weights_only"]),
    (open_clip.get_model_config, ["model_name"]),
    (open_clip.get_pretrained_cfg, ["model", "tag"]),
    (open_clip.download_pretrained, ["cfg", "cache_dir"]),
    (open_clip.pretrained.download_pretrained_from_hf, ["model_id", "cache_dir"]),
    (open_clip.pretrained.list_pretrained_tags_by_model, ["model"]),
    (open_clip.get_input_dtype, ["precision"]),
    (open_clip_train.precision.get_autocast, ["precision", "device_type"]),
    (open_clip_train.distributed.init_distributed_device_so, ["device"]),
]


@pytest.mark.parametrize(("function", "parameters"), BORROWED, ids=lambda value: getattr(value, "__name__", ""))
def test_borrowed_functions_take_these_parameters(function, parameters):
    assert set(parameters) <= set(inspect.signature(function).parameters)


def test_weights_are_loaded_without_unpickling_by_default():
    for function in (open_clip.create_model, open_clip.load_checkpoint):
        assert inspect.signature(function).parameters["weights_only"].default is True


def test_tokenizers_have_what_truncation_counts_need():
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    assert isinstance(tokenizer, open_clip.SimpleTokenizer)
    assert tokenizer.context_length == 77 and tokenizer.encode("a dog") == [320, 1929]
    for name in ("HFTokenizer", "SigLipTokenizer", "basic_clean", "canonicalize_text"):
        assert hasattr(open_clip.tokenizer, name)
