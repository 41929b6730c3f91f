"""The names and signatures of open_clip that we use: if a release changes one, a test here fails and names it."""

import inspect
import re

import open_clip
import open_clip.tokenizer
import open_clip_train.distributed
import open_clip_train.precision
import pytest
import torch
from test_corner import clip_ids, clip_model, random_ids, tower

BORROWED = [
    (open_clip.create_model_and_transforms, ["model_name", "pretrained", "precision", "device", "cache_dir"]),
    (open_clip.create_model, ["load_weights", "pretrained_text", "pretrained_image", "output_dict", "cache_dir"]),
    (open_clip.get_tokenizer, ["model_name", "cache_dir"]),
    (open_clip.load_checkpoint, ["model", "checkpoint_path", "strict", "weights_only"]),
    (open_clip.get_model_config, ["model_name"]),
    (open_clip.get_pretrained_cfg, ["model", "tag"]),
    (open_clip.download_pretrained, ["cfg", "cache_dir"]),
    (open_clip.pretrained.download_pretrained_from_hf, ["model_id", "filename", "cache_dir"]),
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


TOWERS = {"bert": lambda: tower(num_layers=3), "modernbert": lambda: tower("modernbert", num_layers=3)}
TOWERS |= {"clip": lambda: clip_model(2).text, "clip without corners": lambda: clip_model(0).text}


@pytest.mark.parametrize("kind", TOWERS)
def test_text_towers_take_what_open_clip_calls_on_them(kind):
    text = TOWERS[kind]()
    assert text.output_dim and text.context_length and text.vocab_size
    text.lock(1, True)
    text.lock(unlocked_layers=0, freeze_layer_norm=True)
    for enable in (True, False):
        text.set_grad_checkpointing(enable)
    model = open_clip.CustomTextCLIP.__new__(open_clip.CustomTextCLIP)
    torch.nn.Module.__init__(model)
    model.visual, model.text = torch.nn.Identity(), text
    expected = {"text.positional_embedding"} if "clip" in kind else set()
    assert model.no_weight_decay() == expected
    model.lock_text_tower(1, True)


def test_open_clip_uses_nothing_else_of_a_text_tower():
    """Fails if a release of open_clip uses more. Hugging Face towers have no forward_intermediates in open_clip."""
    used = set(re.findall(r"self\.text\.(\w+)", inspect.getsource(open_clip.CustomTextCLIP)))
    known = {"context_length", "vocab_size", "lock", "set_grad_checkpointing", "no_weight_decay"}
    assert used <= known | {"forward_intermediates"}


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("unlocked", [0, 1, 2])
def test_lock_frees_the_last_layers_as_open_clip_does(kind, unlocked):
    text = TOWERS[kind]()
    text.lock(unlocked)
    trained = {name.split(".")[0] for name, parameter in text.named_parameters() if parameter.requires_grad}
    layers = {
        int(
            name.split("layers." if "layers." in name else "layer." if "layer." in name else "resblocks.")[1].split(
                "."
            )[0]
        )
        for name, parameter in text.named_parameters()
        if parameter.requires_grad and any(word in name for word in ("layer.", "layers.", "resblocks."))
    }
    if "clip" in kind:  # the projection is the last group
        assert trained == ({"text_projection"} if unlocked == 1 else set() if not unlocked else trained)
        assert layers == (set() if unlocked < 2 else {len(text.transformer.resblocks) - 1})
    else:
        assert "proj" in trained and layers == set(range(3 - unlocked, 3))


def test_frozen_parts_of_a_text_tower_have_no_dropout():
    from transformers import BertConfig

    from training.model.towers.hf_tower import CornerHFText

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    text = CornerHFText(BertConfig(vocab_size=50, **sizes), 16, 2, 24)
    ids = random_ids(text)
    for unlocked, freeze_layer_norm in ((0, True), (0, False)):
        text.train()
        text.requires_grad_(True).train()
        assert not torch.equal(text(ids), text(ids))  # dropout is on
        text.lock(unlocked, freeze_layer_norm)
        assert torch.equal(text(ids), text(ids))
        text.train()
        assert torch.equal(text(ids), text(ids))
    text.requires_grad_(True)
    text.lock(1)
    modes = [layer.training for layer in text.transformer.encoder.layer]
    assert modes == [False, True] and not text.transformer.embeddings.training and text.transformer.pooler.training


def test_batch_norms_of_a_partly_locked_image_tower_keep_their_mode():
    from training.model.towers.locking import rest_frozen

    tower = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Dropout(), torch.nn.Linear(4, 4)
    )
    stem = torch.nn.Sequential(*tower[:3])
    stem.requires_grad_(False)
    rest_frozen(torch.nn.Sequential(stem, tower[3]).train())
    assert [module.training for module in tower] == [False, True, False, True]


def test_the_causal_tower_without_corners_attends_through_one_mask():
    """A mask for each caption and head would take gigabytes for a training batch."""
    text = clip_model(0).text
    masks = []
    for block in text.transformer.resblocks:
        block.attn.register_forward_pre_hook(
            lambda _, args, kwargs: masks.append(kwargs["attn_mask"]), with_kwargs=True
        )
    text(clip_ids(0))
    assert masks and all(mask.shape == (20, 20) for mask in masks)
