"""Which captions preparation drops as refusals, and where it cuts a caption that stops in the middle."""

import pytest

from training.prepare.clean import clean_caption
from training.readers.captions import is_refusal


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, I cannot help with identifying people in this image.",
        "I\u2019m sorry, but I can't assist with that request.",
        "Sorry, I can't help with that.",
        "I cannot see the image.",
        "I'm unable to view images directly.",
        "As an AI language model, I do not see images.",
        "The image is described below. As an AI model, I can not look at it.",
        "Unfortunately, I don't have access to the picture.",
        "I apologize, but there is nothing to see.",
        "No image was provided.",
        "Please provide the image you want me to describe.",
        "Sorry, but the image you sent can't be opened.",
        "Sorry.",
        "\"I'm sorry, I can't help with that.\"",
        "Could you please upload the image?",
        "Unfortunately, there is no image to describe.",
    ],
)
def test_refusals_are_recognised(text):
    assert is_refusal(text) and clean_caption(text).fault == "refused"


@pytest.mark.parametrize(
    "text",
    [
        'A card that says "I\'m sorry" lies on a table.',
        "The image shows a robot, an AI assistant on wheels.",
        "A sorry-looking dog sits in the rain.",
        "There is no image on the screen of the laptop, which stands on a desk.",
        "I can see a dog in a park.",
        "Iceland has a volcano. Please provide.",
        "Sorry, we are closed, says a red sign on a glass door of a small shop.",
        "Sorry, no vacancies: a neon sign glows above a motel.",
        "Sorry we missed you. A note hangs on the handle of a door.",
        "I'm sorry, reads the card beside a bunch of flowers.",
        '"I\'m sorry" is written in icing on a cake.',
        "\u201cI can\u2019t keep calm\u201d reads a t-shirt.",
        "Please share your image, says the poster.",
        "Unfortunately placed, a pole hides the face of a man.",
    ],
)
def test_descriptions_are_not_refusals(text):
    assert not is_refusal(text) and clean_caption(text).text == text


@pytest.mark.parametrize(
    "text",
    [
        "\u732b\u304c\u3044\u308b\u3002\u72ac\u304c\u8d70\u308b\uff01",  # Japanese, with an exclamation mark
        "\u4e00\u53ea\u732b\u3002\u4e00\u53ea\u72d7\u5728\u8dd1\u5417\uff1f",  # Chinese, with a question mark
        "\u4ed6\u8bf4\uff1a\u201c\u597d\u3002\u201d",  # Chinese, with a closing quote
        "\u0915\u0941\u0924\u094d\u0924\u093e\u0964 \u092c\u093f\u0932\u094d\u0932\u0940\u0964",  # Hindi
        "\u0647\u0630\u0627 \u0643\u0644\u0628. \u0633\u0631\u064a\u0639\u061f",  # Arabic, with its question mark
    ],
)
def test_long_captions_of_other_scripts_keep_their_last_sentence(text):
    for long in (text, f"{text} {text}"):
        assert clean_caption(long, long=True) == (long, None, False, False)
    assert clean_caption(f"{text} {text[:2]}", long=True) == (text, None, False, True)


def test_cut_off_last_sentences():
    def long(text: str) -> tuple[str | None, bool]:
        cleaned = clean_caption(text, long=True)
        return cleaned.text, cleaned.cut_off

    assert long("A dog runs over grass. It is brown. The sky is") == ("A dog runs over grass. It is brown.", True)
    assert long('He says "hello."') == ('He says "hello."', False)
    assert long("1. A dog 2. A cat 3. A bird and") == ("1. A dog 2. A cat 3. A bird and", True)  # not prose: unchanged
    assert long("A tall building of 3.5 storeys and a tree of") == (
        "A tall building of 3.5 storeys and a tree of",
        True,
    )
    assert clean_caption("A dog. It is brown and", long=True, trim=False).text == "A dog. It is brown and"
    assert clean_caption("a dog on", long=False) == ("a dog on", None, False, False)
