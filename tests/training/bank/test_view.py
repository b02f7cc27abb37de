"""`tinyalign bank view`: the page, opened and clicked in a real browser where there is one."""

import json
import os
import re
import shutil

import numpy as np
import pytest

from tinyalign_cli.main import main
from tinyalign_vlm import MemoryBank
from tinyalign_vlm.training.bank.view import page_data, principal_components, similarities

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"

LONG_NAME = "x" * 90  # of a column: wider than a phone


@pytest.fixture(scope="module")
def place(images, captions, model, processor, value_encoder, tmp_path_factory):
    """A bank of 13 rows, two of them of one image and one with a caption that is HTML; its page; the page's data."""
    root = tmp_path_factory.mktemp("view")
    rows = [{"image": image, "caption": caption} for image, caption in zip(images, captions, strict=True)]
    rows[3]["caption"] = HOSTILE
    rows.append({"image": images[0], "caption": "the first image again"})
    for number, row in enumerate(rows):
        row.update({LONG_NAME: "y" * 300, "licence": f"cc-{number % 9}"})
    rows[2]["licence"] = None
    settings = {"keep_duplicates": True, "keep_columns": ["licence", LONG_NAME]}
    bank = MemoryBank.build(rows, model, processor, value_encoder, **settings)
    bank.save_pretrained(root / "bank")
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    images[5].save(root / "query.png")
    command = ["bank", "view", root / "bank", "-o", root / "page.html", "--image", root / "query.png"]
    main([*map(str, command), "--model", str(root / "model"), "--top_k", "4", "--rows", "30"])
    return root


@pytest.fixture(scope="module")
def data(place) -> dict:
    text = (place / "page.html").read_text()
    return json.loads(re.search('<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1])


def test_what_is_in_the_page(place, data, captions):
    bank = MemoryBank.from_pretrained(place / "bank")
    assert sorted(data["sample"]) == list(range(13)) and data["rows"]["3"]["caption"] == HOSTILE
    assert data["rows"]["2"]["thumbnail"].startswith("data:image/jpeg;base64,")
    scores, ids = bank.search(bank.keys([5]), 4, exclude=[bank.rows([5])[0]["source_id"]])
    assert [row for row, _ in data["neighbours"]["5"]] == ids[0].tolist()
    np.testing.assert_allclose([score for _, score in data["neighbours"]["5"]], scores[0], atol=1e-4)
    # rows of the same image are no neighbours of each other, but of the image that was given
    assert 12 not in [row for row, _ in data["neighbours"]["0"]]
    (query,) = data["queries"]
    assert query["caption"] == "query.png" and query["neighbours"][0][0] == 5 and query["neighbours"][0][1] > 0.999
    np.testing.assert_allclose(query["place"], data["map"][data["sample"].index(5)][1:], atol=1e-4)
    text = (place / "page.html").read_text()
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    assert str(place) not in text and "local copy" not in text
    assert HOSTILE not in text and text.count("<script") == 2


def test_neighbours_beyond_the_sample_are_on_the_map(place):
    bank = MemoryBank.from_pretrained(place / "bank")
    data = page_data(bank, np.array([3, 7]), 4, [], np.empty((0, bank.config.key_dim), np.float32))
    assert data["sample"] == [3, 7] and list(data["neighbours"]) == [3, 7]
    near = {row for found in data["neighbours"].values() for row, _ in found}
    assert {row for row, *_ in data["map"]} == set(data["rows"]) == {3, 7} | near


def test_numbers():
    keys = np.array([[1, 0, 0], [-1, 0, 0], [0, 2, 0], [0, -2, 0], [0, 0, 0.5]], np.float32)
    places, share = principal_components(keys, 4)
    np.testing.assert_allclose(np.abs(places), [[0, 1], [0, 1], [2, 0], [2, 0], [0, 0]], atol=1e-6)
    assert share == pytest.approx(1)
    found = similarities(keys[:3], np.array([0.0, 0.0, -np.inf], np.float32), ["a", "b", "b"])
    # b and b are one image: the pairs are (0, 1) and (0, 2)
    assert (found["low"], found["high"]) == (-1, 1)
    assert found["random"][0] == 0.5 and sum(found["random"]) == pytest.approx(1) and sum(found["nearest"]) == 1
    many = np.ones((40_000, 1), np.float32)  # only some are paired: all would not fit in memory
    assert similarities(many, many[:, 0], list(map(str, range(40_000))))["random"][-1] == 1
    places, share = principal_components(np.ones((2, 1), np.float32), 2)
    assert places.shape == (2, 2) and share == 1


def test_bad_inputs(place, tmp_path):
    def fails(message: str, *options: str):
        with pytest.raises(SystemExit, match=message):
            main(["bank", "view", str(place / "bank"), "-o", str(tmp_path / "page.html"), *options])
        assert not (tmp_path / "page.html").exists()

    fails("has no row 13, expected 0 to 12", "--row", "2", "13")
    fails("Found --image without --model", "--image", str(place / "query.png"))
    fails("'missing.png' is no file", "--image", "missing.png", "--model", str(place / "model"))
    fails(f"{tmp_path} cannot be written .Is a directory", "-o", str(tmp_path))
    fails("--rows is 0", "--rows", "0")
    fails("--seed -1, expected 1, 1 and 0 or more", "--seed", "-1")


def test_a_bank_without_thumbnails_and_one_row(images, model, processor, value_encoder, tmp_path):
    rows = [{"image": images[0], "caption": "alone"}]
    MemoryBank.build(rows, model, processor, value_encoder, thumbnail_size=None).save_pretrained(tmp_path / "bank")
    main(["bank", "view", str(tmp_path / "bank"), "-o", str(tmp_path / "page.html")])
    assert "alone" in (tmp_path / "page.html").read_text()


def test_a_full_disk_leaves_the_page_that_was_there(place, small_disk):
    page, space = small_disk / "page.html", os.statvfs(small_disk)
    page.write_text("earlier")
    (small_disk / "filler").write_bytes(bytes(space.f_bavail * space.f_frsize - 8192))
    with pytest.raises(SystemExit, match="No space left"):
        main(["bank", "view", str(place / "bank"), "-o", str(page)])
    assert page.read_text() == "earlier" and len(list(small_disk.iterdir())) == 2


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright, which drives the browser")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs a browser on the PATH: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_in_a_browser(place, data, browser):
    page = browser.new_page()
    problems, requests = [], []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: requests.append(request.url))
    page.goto((place / "page.html").as_uri())
    assert page.title() == "Memory bank" and page.inner_text("h1") == "Memory bank bank"
    # pictures and a sentence come first, hashes last
    assert page.inner_text("#about").startswith("13 pictures with captions. A model with the vision tower ")
    assert page.evaluate("document.querySelector('#neighbours img').getBoundingClientRect().bottom") < 700
    assert not page.is_visible("#facts")
    page.click("summary")
    assert "13 of 12 images" in page.inner_text("#facts")
    # at first, the neighbours of the image that was given
    cards = page.locator("#neighbours .row")
    assert "query.png" in cards.nth(0).inner_text() and "row 5" in cards.nth(1).inner_text()
    # then those of a row that is clicked
    assert page.locator("#rows .row").count() == 13
    page.click('#rows [data-row="3"]')
    assert HOSTILE in cards.nth(0).inner_text() and page.title() == "Memory bank"
    expected = [f"{score:.3f} · row {row}" for row, score in data["neighbours"]["3"]]
    assert [cards.nth(number + 1).locator("small").first.inner_text() for number in range(4)] == expected
    assert page.locator("circle.on").get_attribute("data-row") == "3"
    near = page.locator("circle.near").evaluate_all("dots => dots.map(dot => Number(dot.dataset.row))")
    assert sorted(near) == sorted(row for row, _ in data["neighbours"]["3"])
    assert page.locator("#map text").all_text_contents() == ["1", "2", "3", "4"]
    assert page.locator("#map line").count() == 4
    assert page.evaluate("document.querySelector('#neighbours img').naturalWidth") > 0
    # and of a neighbour, and of a dot of the map
    first = data["neighbours"]["3"][0][0]
    cards.nth(1).click()
    assert f"row {first} " in cards.nth(0).inner_text()
    page.dispatch_event('circle[data-row="7"]', "click")
    assert "row 7 " in cards.nth(0).inner_text()
    page.dispatch_event("circle.query", "click")
    assert "query.png" in cards.nth(0).inner_text()
    assert page.locator("circle.on").get_attribute("class") == "query on"
    # colours follow a column, and the legend says which value has which
    fill = "dots => new Set(dots.map(dot => dot.style.fill)).size"
    assert page.input_value("#colours") == "licence" and page.locator("#legend span").count() == 8
    assert page.locator("#map circle:not(.query)").evaluate_all(fill) == 8
    assert "cc-0 (2)" in page.inner_text("#legend") and "3 others" in page.inner_text("#legend")
    page.select_option("#colours", "")
    assert page.locator("#map circle:not(.query)").evaluate_all(fill) == 1
    page.fill("#filter", "WHITE circle")
    assert page.locator("#rows .row").count() == 3 and "of 3" in page.inner_text("#count")
    assert page.locator("#map circle").count() == 14 and page.locator("#histogram rect").count() == 100
    # a phone
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert problems == [] and all(url.startswith(("file:", "data:")) for url in requests)
    page.close()
