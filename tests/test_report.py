"""The report as a reader sees it: in a headless browser, from disk, with captions that contain code."""

import re
import shutil

import numpy as np
import pytest

from eval_files import write_coco, write_image
from support import read_results
from training.eval.npz import read_features
from training.main import main

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> $1_2 & co"
NUM = 130


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Writes 130 pairs with noisy features; caption 7 contains code, and image 3 is missing."""
    folder = tmp_path_factory.mktemp("features")
    rng = np.random.default_rng(0)
    images = rng.normal(size=(NUM, 16)).astype(np.float32)
    texts = images + rng.normal(size=(NUM, 16)).astype(np.float32)
    captions = [EVIL if n == 7 else f"Caption {n} of a {'red' if n % 2 else 'blue'} thing." for n in range(NUM)]
    for n in range(NUM):
        if n != 3:
            write_image(folder / "pics" / f"{n}.jpg", n)
    arrays = {"image_features": images, "text_features": texts, "captions": captions}
    paths = [f"pics/{n}.jpg" for n in range(NUM)]
    np.savez(folder / "first.npz", **arrays, image_paths=paths, title="<b>First</b> $x_")
    np.savez(folder / "second.npz", image_features=images[:20, :9], text_features=texts[:20, :9])
    return folder


@pytest.fixture(scope="module")
def report(features, tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    files = [str(features / f"{name}.npz") for name in ("first", "second")]
    assert main(["--features", *files, "--report", "--logs", str(logs), "--name", "r", "--device", "cpu"]) == 0
    return logs / "r" / "report.html"


@pytest.fixture(scope="module")
def browser():
    if not BROWSER:
        pytest.skip("no Chromium here (Debian: apt install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, report):
    """Opens the report from disk; the test fails on any error in it and on any network request."""
    page = browser.new_page()
    trouble = []
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or trouble.append(request.url))
    page.goto(report.as_uri())
    page.wait_for_selector("#list button")
    yield page
    page.close()
    assert trouble == []


def expected_ranks(features):
    with np.load(features / "first.npz") as file:
        image, text = (file[f"{kind}_features"].astype(np.float64) for kind in ("image", "text"))
    score = (image / np.linalg.norm(image, axis=1)[:, None]) @ (text / np.linalg.norm(text, axis=1)[:, None]).T
    own = np.diag(score)
    return {"i2t": 1 + (score > own[:, None]).sum(1), "t2i": 1 + (score > own[None]).sum(0)}


def wait_for_status(page, text):
    page.wait_for_function("text => document.getElementById('status').textContent === text", arg=text)


def test_table_and_list_show_the_ranks(page, features):
    ranks = expected_ranks(features)
    shown = page.locator("tbody tr").first.locator("td").all_inner_texts()
    assert shown[0] == f"{NUM}" and shown[1] == f"{100 * (ranks['i2t'] == 1).mean():.2f}"
    listed = page.locator("#list button > span:nth-child(2)").all_inner_texts()
    assert listed == [str(rank) for rank in ranks["t2i"][:50]]
    assert "page 1 of 3" in page.inner_text("#page")
    page.click("#next")
    assert page.locator("#list button > span:nth-child(2)").first.inner_text() == str(ranks["t2i"][50])


def test_filters_by_rank_and_search(page, features):
    ranks = expected_ranks(features)["t2i"]
    page.fill("#low", "2")
    wait_for_status(page, f"{(ranks > 1).sum()} of {NUM} queries")
    page.fill("#high", "3")
    wait_for_status(page, f"{((ranks > 1) & (ranks <= 3)).sum()} of {NUM} queries")
    page.fill("#low", "1")
    page.fill("#high", "")
    page.fill("#search", "RED thing")
    wait_for_status(page, f"{NUM // 2 - 1} of {NUM} queries")  # all odd numbers except 7
    page.fill("#search", "no such words")
    wait_for_status(page, f"0 of {NUM} queries")
    assert page.inner_text("#detail") == "No query matches."
    page.fill("#search", "")
    page.select_option("#order", "worst")
    # The list is drawn shortly after the search, so it may still be empty.
    first = "worst => document.querySelector('#list button > span:nth-child(2)')?.textContent === worst"
    page.wait_for_function(first, arg=str(ranks.max()))
    listed = page.locator("#list button > span:nth-child(2)").all_inner_texts()
    assert [int(rank) for rank in listed] == sorted(ranks, reverse=True)[:50]


def test_what_the_model_found_in_both_directions(page, features):
    (encoded,) = read_features([str(features / "first.npz")])
    page.click("#list li:nth-child(5) button")
    order = np.argsort(-(encoded.texts[4] @ encoded.images.T).numpy())[:10]
    names = page.locator("#detail .matches li > img, #detail .matches li > .none").evaluate_all(
        "all => all.map(e => e.alt || e.textContent)"
    )
    assert names == [f"{n}.jpg" if n != 3 else "no image" for n in order]
    page.select_option("#direction", "i2t")
    page.click("#list li:nth-child(5) button")
    order = np.argsort(-(encoded.images[4] @ encoded.texts.T).numpy())[:10]
    assert page.locator("#detail .matches li > p").all_inner_texts() == [encoded.pairs.captions[n] for n in order]
    rank = expected_ranks(features)["i2t"][4]
    assert f"rank {rank}." in page.inner_text("#detail")


def test_another_benchmark(page):
    page.select_option("#set", label="second")
    wait_for_status(page, "20 of 20 queries")
    assert page.inner_text("#query") == "caption 0" and page.locator("#detail img").count() == 0
    assert page.locator("#detail .none").count() == 1 + 10


def test_images_load_when_shown(page):
    page.wait_for_function(
        "() => [...document.querySelectorAll('#detail img')].every(e => e.complete && e.naturalWidth > 0)"
    )
    assert page.locator("#detail img").count() >= 10
    assert page.evaluate("document.images.length") < 70  # of 129: the images of one page of the list, and of one query
    page.click("#list li:nth-child(4) button")
    assert "no image" in page.inner_text("#detail")


def test_code_in_a_caption_stays_text(page):
    page.click("#list li:nth-child(8) button")
    assert page.inner_text("#query") == EVIL
    page.select_option("#direction", "i2t")
    page.click("#list li:nth-child(8) button")
    assert EVIL in page.inner_text("#detail")
    assert "<b>First</b> $x_" in page.inner_text("tbody th")
    assert "taken" not in page.title() and page.locator("script").count() == 4


def test_keyboard(page):
    def chosen():
        return page.locator("#list button[aria-current=true]").first.get_attribute("aria-label")

    page.keyboard.press("j")
    page.keyboard.press("j")
    assert "Caption 2 " in chosen()
    page.keyboard.press("k")
    assert "Caption 1 " in chosen()
    page.keyboard.press("n")
    assert "Caption 50 " in chosen() and "page 2" in page.inner_text("#page")
    page.keyboard.press("p")
    assert "Caption 0 " in chosen()
    page.keyboard.press("d")
    assert "0.jpg" in chosen()
    page.keyboard.press("/")
    page.keyboard.type("jack")  # in the search field, j and k are ordinary letters
    assert page.input_value("#search") == "jack"


@pytest.mark.parametrize("size", [(1300, 800), (768, 1024), (390, 800)])
def test_opens_at_its_top(browser, report, size):
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    page.goto(report.as_uri())
    page.wait_for_selector("#list button")
    assert page.evaluate("document.documentElement.scrollHeight") > size[1]
    assert page.evaluate("scrollY") == 0
    page.select_option("#order", "worst")
    page.wait_for_function("() => document.querySelector('#list button > span:nth-child(2)')?.textContent !== '1'")
    worst = page.locator("#list button").first.bounding_box()["y"] - page.locator("#list").bounding_box()["y"]
    assert abs(worst) < 3 and page.evaluate("scrollY") <= page.evaluate("document.querySelector('#controls').offsetTop")
    page.close()


def test_a_key_shows_the_query_it_chose(page):
    for key in "kj" + 20 * "j":
        page.keyboard.press(key)
    chosen = page.locator("#list button[aria-current=true]").bounding_box()
    frame = page.locator("#list").bounding_box()
    assert frame["y"] - 1 <= chosen["y"] and chosen["y"] + chosen["height"] <= frame["y"] + frame["height"] + 1
    assert 0 <= chosen["y"] < page.viewport_size["height"]


def test_a_link_leads_to_its_query(page, report):
    page.goto("about:blank")
    page.goto(report.as_uri() + "#0,i2t,77")
    page.wait_for_selector("#list button")
    assert "Image 78: 77.jpg" in page.inner_text("#detail")
    page.wait_for_function("() => document.querySelector('#detail').getBoundingClientRect().top < innerHeight / 2")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (375, "light"), (375, "dark")])
def test_accessible_on_desktop_and_phone(page, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    for direction in ("t2i", "i2t"):
        page.select_option("#direction", direction)
        found = Axe().run(page).response["violations"]
        assert [(v["id"], v["impact"], v["nodes"][0]["html"]) for v in found if v["impact"] != "minor"] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # no horizontal scrolling


def test_ten_thousand_queries_do_not_freeze(browser, tmp_path):
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(10_000, 8)).astype(np.float32)
    captions = [f"Number {n}. " + "many words of a long description " * 5 for n in range(10_000)]
    np.savez(tmp_path / "many.npz", image_features=rows, text_features=rows, captions=captions)
    argv = ["--features", str(tmp_path / "many.npz"), "--report", "--logs", str(tmp_path), "--name", "r"]
    assert main([*argv, "--device", "cpu"]) == 0
    page = browser.new_page()
    page.goto((tmp_path / "r" / "report.html").as_uri())
    page.wait_for_selector("#list button")
    page.fill("#search", "number 9999.")
    wait_for_status(page, "1 of 10,000 queries")
    page.fill("#search", "")
    wait_for_status(page, "10,000 of 10,000 queries")
    for _ in range(3):
        page.click("#next")
    assert "page 4 of 200" in page.inner_text("#page")
    assert page.evaluate("document.querySelectorAll('*').length") < 2000
    page.click("#list li:nth-child(2) button")
    page.wait_for_function("() => location.hash === '#0,t2i,151'")
    page.close()


def test_of_many_queries_all_failures_and_a_sample_of_the_rest_are_shown(browser, tmp_path):
    number = 12_000
    rows = np.random.default_rng(1).normal(size=(number, 12)).astype(np.float32)
    texts = rows.copy()
    texts[::40] = -texts[::40]  # 300 captions that find anything but their image
    np.savez(tmp_path / "many.npz", image_features=rows, text_features=texts)
    argv = ["--features", str(tmp_path / "many.npz"), "--report", "--logs", str(tmp_path), "--name", "r"]
    assert main([*argv, "--device", "cpu"]) == 0
    failures = round(number * (1 - read_results(tmp_path, "r")["many-retrieval-t2i-top1"]))
    assert failures >= 300
    page = browser.new_page()
    page.goto((tmp_path / "r" / "report.html").as_uri())
    wait_for_status(page, "10,000 of 10,000 queries")
    shown = f"{failures:,} of {failures:,} whose first answer is wrong, and {10_000 - failures:,} of the"
    assert "shows 10,000 of 12,000 queries" in page.inner_text("#note") and shown in page.inner_text("#note")
    page.fill("#low", "1.1")
    wait_for_status(page, f"{failures:,} of 10,000 queries")
    page.fill("#search", "caption 11960")  # of this caption, the page shows its own number
    wait_for_status(page, "1 of 10,000 queries")
    assert page.inner_text("#detail h3") == "Caption 11961" and page.inner_text("#query") == "caption 11960"
    assert page.locator("#detail .matches > li").count() == 10 and "image 11960" in page.inner_text("#detail")
    page.close()


def test_saved_features_give_the_same_numbers_and_page(tmp_path, tiny_clip):
    common = ["--logs", str(tmp_path), "--device", "cpu", "--report"]
    coco = ["--coco-retrieval", str(write_coco(tmp_path / "coco")), "--model", tiny_clip, "--workers", "0"]
    assert main([*coco, *common, "--name", "one", "--save-features"]) == 0
    saved = tmp_path / "one" / "features" / "coco-retrieval.npz"
    assert main(["--features", str(saved), *common, "--name", "two"]) == 0
    first, second = read_results(tmp_path, "one"), read_results(tmp_path, "two")
    keys = [k for k in first if re.match(r"coco-retrieval-(i2t|t2i|truncated)", k)]
    assert len(keys) > 10 and {k: first[k] for k in keys} == {k: second[k] for k in keys}
    assert second["model"] is None and second["flags"]["features"] == [str(saved)]
    parts = [re.findall(r'id="(?:content|thumbnails)".*?>(.*?)<', (tmp_path / n / "report.html").read_text()) for n in
             ("one", "two")]  # fmt: skip
    assert parts[0] == parts[1]


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"image_features": np.ones((3, 4))}, "text_features: expected"),
        ({"image_features": np.ones((3, 4)), "text_features": np.ones((3, 5))}, "different numbers of columns"),
        ({"image_features": np.ones((3, 4)), "text_features": np.ones((4, 4))}, "no image_of_caption"),
        ({"image_features": np.full((3, 4), np.nan), "text_features": np.ones((3, 4))}, "NaN"),
        (
            {"image_features": np.ones((2, 4)), "text_features": np.ones((2, 4)), "captions": ["a"]},
            "captions has shape",
        ),
        ({"image_features": np.ones((2, 4)), "text_features": np.ones((2, 4)), "image_of_caption": [0, 2]}, "rows of"),
        (
            {"image_features": np.ones((2, 4)), "text_features": np.ones((2, 4)), "captions": np.array(["a", None])},
            "str",
        ),
    ],
)
def test_features_that_do_not_fit_exit_2(arrays, said, tmp_path, capsys):
    np.savez(tmp_path / "x.npz", **arrays)
    assert main(["--features", str(tmp_path / "x.npz"), "--logs", str(tmp_path), "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert said in err and "x.npz" in err and err.count("error:") == 1
