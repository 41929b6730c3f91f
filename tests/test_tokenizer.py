"""Tokenizers with corner tokens, for each family: layout, truncation, lists without padding, tokens lost."""

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from training.model.tokenizers import CornerCLIPTokenizer, CornerHFTokenizer, count_tokens, tokenise_and_count_lost

TEXT = "A man walks. He carries 3.5 kg of flour &amp; two eggs.  It rains"
ROBERTA_NAMES = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
ROBERTA_NAMES |= {"pad_token": "<pad>", "unk_token": "<unk>"}
CORPUS = [TEXT, "two dogs run in the rain", "He walks a dog. A man carries eggs"] * 5


def save_roberta(folder):
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        CORPUS, vocab_size=400, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False
    )
    backend = bpe._tokenizer
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", **names).save_pretrained(
        folder
    )


def save_xlmr(folder):
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", **names).save_pretrained(
        folder
    )


def save_modernbert(folder):
    bpe = ByteLevelBPETokenizer()
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    bpe.train_from_iterator(CORPUS, vocab_size=400, special_tokens=special, show_progress=False)
    backend = bpe._tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]", **names).save_pretrained(folder)


FAMILIES = {"roberta": save_roberta, "xlm-roberta": save_xlmr, "modernbert": save_modernbert, "bert": None}


@pytest.fixture(params=FAMILIES)
def source(request, tmp_path, minilm_folder):
    if FAMILIES[request.param] is None:
        return minilm_folder
    FAMILIES[request.param](tmp_path)
    return tmp_path


def test_layout(source):
    plain = CornerHFTokenizer(source, 90, 0)
    corner = CornerHFTokenizer(source, 90, 3)
    base = len(corner.tokenizer) - 3
    assert corner.corner_ids == [base, base + 1, base + 2]
    (without,), (row,) = plain(TEXT, padding=False), corner(TEXT, padding=False)
    assert row == without[:1] + corner.corner_ids + without[1:]
    cls_id, sep_id = plain.tokenizer.cls_token_id, plain.tokenizer.sep_token_id
    assert row[0] == cls_id and row[-1] == sep_id
    num_ends = 3 if plain.tokenizer.sep_token == "[SEP]" else 1  # one per sentence, where the vocabulary has [SEP]
    assert row.count(sep_id) == num_ends


def test_truncation_keeps_corners_and_the_end(source):
    tokenizer = CornerHFTokenizer(source, 10, 3)
    ids = tokenizer([TEXT, "two dogs"])
    full = tokenizer(TEXT, context_length=200, padding=False)[0]
    assert ids.shape == (2, 10) and ids[0].tolist() == full[:9] + [full[-1]]
    assert ids[1, -1] == tokenizer.pad_id or len(tokenizer("two dogs", padding=False)[0]) == 10
    assert tokenise_and_count_lost(tokenizer, [TEXT, ""])[1] == [len(full) - 10, 0]


def test_long_texts_are_cut_as_transformers_cuts_them(source):
    tokenizer = CornerHFTokenizer(source, 14, 2)
    texts = ["", "two dogs", TEXT, TEXT * 30]
    ids, lost = tokenise_and_count_lost(tokenizer, texts)
    for text, row, num_lost in zip(texts, ids.tolist(), lost):
        joined = "[SEP]".join(text.split(". ")) if tokenizer.separator else text
        expected = tokenizer.tokenizer(" ".join(joined.split()), truncation=True, max_length=12).input_ids
        row = [token for token in row if token != tokenizer.pad_id]
        assert row[:1] + row[3:] == expected and row[1:3] == tokenizer.corner_ids
        assert num_lost == max(0, count_tokens(tokenizer, [text])[0] - 14)
    assert torch.equal(ids, tokenizer(texts)) and lost[:2] == [0, 0] and lost[3] > 100


def test_one_text_many_texts_no_texts_and_the_list_stays_as_it_was(minilm_folder):
    tokenizer = CornerHFTokenizer(minilm_folder, 32, 2)
    texts = [TEXT, "", "  two\n dogs "]
    ids = tokenizer(texts)
    assert texts == [TEXT, "", "  two\n dogs "]
    assert torch.equal(tokenizer(TEXT)[0], ids[0]) and torch.equal(tokenizer(tuple(texts)), ids)
    assert ids[1].tolist() == [101, 30522, 30523, 102] + [0] * 28
    assert tokenizer([]).shape == (0, 32)


def test_saved_tokenizer_gives_the_same_ids(source, tmp_path):
    first = CornerHFTokenizer(source, 40, 2)
    first.save_pretrained(tmp_path / "saved")
    again = CornerHFTokenizer(tmp_path / "saved", 40, 2)
    assert torch.equal(first(CORPUS), again(CORPUS))


def test_clip_layout():
    from open_clip import SimpleTokenizer

    plain, corner = CornerCLIPTokenizer(77, 0), CornerCLIPTokenizer(77, 2)
    long_text = TEXT * 20
    assert torch.equal(plain([TEXT, long_text]), SimpleTokenizer()([TEXT, long_text]))
    row, cut = corner([TEXT, long_text]).tolist()
    end = row.index(49407)
    assert row[end - 2 : end] == [49408, 49409] and row[: end - 2] == plain(TEXT)[0].tolist()[: end - 2]
    assert len(cut) == 77 and cut[-3:] == [49408, 49409, 49407]
    lost = tokenise_and_count_lost(corner, [TEXT, long_text])[1]
    assert lost == [0, count_tokens(corner, [long_text])[0] - 77] and lost[1] > 0


def test_the_message_about_a_missing_tokenizer_names_the_searched_places(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="not found in --cache-dir"):
        CornerHFTokenizer("no-such/tokenizer", cache_dir=str(tmp_path))
