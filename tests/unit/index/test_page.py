"""The page: its answers, and what Chromium shows and does with them."""

from __future__ import annotations

import json
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from hash_encoder import HashEncoder
from nvembed.core.files import write_jsonl
from nvembed.index.build import IndexOptions, index_documents
from nvembed.index.database import Database
from nvembed.index.search import Found, SearchOptions, map_of, query_vector, search_database

uvicorn = pytest.importorskip("uvicorn", reason="needs the extra nvembed[index]")
from fastapi.testclient import TestClient

from nvembed.index.page import _hit, page_app

EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> moon"
ROWS = [
    {"id": "a", "text": "the moon turns around the earth", "year": 1999, "lang": "en"},
    {"id": "b", "text": "the moon is bright tonight", "year": 2010, "lang": "en"},
    {"id": EVIL, "text": EVIL, "year": 2020, "lang": EVIL},
    {"id": "d", "text": "bread and soup", "year": 2021, "open": True,
     "size": 2**53 + 1, "extra": {"a": [1.5, None]}, "far": float("inf")},
]  # fmt: skip


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Database:
    folder = tmp_path_factory.mktemp("page")
    write_jsonl(folder / "docs.jsonl", ROWS)
    index_documents(folder / "db", [folder / "docs.jsonl"], model=HashEncoder(64), task="Find it")
    return Database.open(folder / "db")


@pytest.fixture(scope="module")
def address(database):
    with served(database) as found:
        yield found


@contextmanager
def served(database: Database) -> Iterator[str]:
    config = uvicorn.Config(page_app(database, HashEncoder(64)), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


def post(address: str, body: object) -> tuple[int, dict]:
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/api/search", data, headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_a_passage_tells_its_place():
    fields = {"file": "/x/a.md", "heading": "A > B", "start": 0, "end": 4, "line": 3, "year": 1999}
    scores = (0.5, None, None, np.zeros(2, np.float32))
    hit = _hit(Found(1, "a.md#0123456789ab", "text", fields, *scores), [0.0, 0.0])
    assert (hit["source"], hit["fields"]) == ("line 3 · A > B", {"year": 1999})
    row = _hit(Found(1, "a", "text", fields, *scores), [0.0, 0.0])  # a row with such fields
    assert (row["source"], row["fields"]) == (None, fields)


@pytest.fixture(scope="module")
def passages(tmp_path_factory) -> Database:
    folder = tmp_path_factory.mktemp("passages")
    (folder / "docs").mkdir()
    text = "# Moon\n\nThe moon turns.\n\n## Light\n\nIt is bright tonight.\n"
    (folder / "docs" / "a.md").write_text(text)
    options = IndexOptions(passages=12)
    index_documents(folder / "db", [folder / "docs"], model=HashEncoder(64), options=options)
    return Database.open(folder / "db")


def test_rows_are_called_what_they_are(database, passages, tmp_path):
    assert (database.unit, passages.unit) == ("document", "passage")
    about = TestClient(page_app(passages, HashEncoder(64))).get("/api/about").json()
    assert (about["count"], about["unit"]) == (2, "passage")
    # Rows with an id or a field as passages have it are documents.
    rows = [{"id": "a#0123456789ab", "text": "x"}, {"id": "b", "text": "y", "start": 3}]
    write_jsonl(tmp_path / "docs.jsonl", rows)
    index_documents(tmp_path / "db", [tmp_path / "docs.jsonl"], model=HashEncoder(64))
    assert Database.open(tmp_path / "db").unit == "document"


@pytest.mark.parametrize("hybrid", [False, True])
def test_answers_are_those_of_the_search(address, database, hybrid):
    asked = {"query": "bright moon", "where": "year > 2000", "hybrid": hybrid, "top_k": 2}
    status, body = post(address, asked)
    assert status == 200
    encoder = HashEncoder(64)
    options = SearchOptions(where="year > 2000", hybrid=hybrid, top_k=2)
    expected = search_database(database, encoder, "bright moon", options)
    assert [hit["id"] for hit in body["hits"]] == [hit.id for hit in expected]
    for hit, known in zip(body["hits"], expected, strict=True):
        assert hit["text"] == known.text
        assert hit["fields"] == {"year": known.fields["year"], **hit["fields"]}
        assert hit["cosine"] == pytest.approx(known.cosine)
        assert (hit["words"], hit["fused"]) == (known.words, known.fused)
    query = query_vector(database, encoder, "bright moon", None)
    places = map_of(np.stack([query, *(hit.vector for hit in expected)]))
    np.testing.assert_allclose([body["query"], *(h["place"] for h in body["hits"])], places)
    assert body["passing"] == 3
    written = {hit["id"]: hit["fields"] for hit in post(address, {"query": "soup"})[1]["hits"]}
    assert written["a"] == {"year": 1999, "lang": "en"}
    # A browser reads numbers as floats, and knows no endless ones.
    assert written["d"] == {
        "year": 2021,
        "open": True,
        "size": "9007199254740993",
        "extra": '{"a": [1.5, null]}',
        "far": "inf",
    }
    with urllib.request.urlopen(f"{address}/api/about") as answer:
        about = json.loads(answer.read())
    assert about["fields"] == {
        "id": "text", "text": "text", "year": "number", "lang": "text", "open": "boolean",
        "size": "number", "extra": "JSON value", "far": "number",
    }  # fmt: skip
    other = post(address, {**asked, "task": "the moon"})[1]
    assert other["hits"][0]["cosine"] != body["hits"][0]["cosine"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"query": " "}, 400, "the query is empty"),
        ({"query": "x", "where": "year > 'a'"}, 400, "expected a number for year"),
        ({"query": "x", "where": "1=1; DROP TABLE documents"}, 400, "cannot be read"),
        ({"query": "x", "top_k": 0}, 422, "greater than or equal to 1"),
        ({"query": "x", "top_k": 1000}, 422, "less than or equal to 200"),
        ({"query": 3}, 422, "valid string"),
        ({"query": "x" * 10_001}, 422, "at most 10000"),
        ({"query": "x", "other": 1}, 422, "Extra inputs"),
        ([], 422, "valid dictionary"),
    ],
)
def test_bad_requests_say_what_is_wrong(address, body, status, message):
    found, answer = post(address, body)
    assert found == status
    assert message in json.dumps(answer)


def test_the_page_is_whole_and_may_load_nothing(address):
    with urllib.request.urlopen(address) as answer:
        html, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    addresses = html.replace("http://www.w3.org/2000/svg", "")
    assert "http:" not in addresses
    assert "https:" not in addresses
    assert "innerHTML" not in html


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("needs Chromium (Debian: apt install chromium)")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, address):
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    problems: list[str] = []
    asked: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(address)
    opened.wait_for_selector("#task option[value=default]", state="attached")
    yield opened
    assert all(url.startswith(address) for url in asked), asked
    opened.close()
    assert [p for p in problems if "400" not in p] == []


def ids(page) -> list[str]:
    until(lambda: "Searching" not in page.inner_text("#status"))
    return page.locator("#results .id").all_text_contents()


def until(condition) -> None:
    """Wait; the page's policy lets no test evaluate conditions in it."""
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("did not come to pass in 10 s")


def search(page, query: str) -> None:
    page.fill("#query", query)
    page.press("#query", "Enter")
    page.wait_for_selector("#results li")


def test_search_in_a_browser(page, database):
    assert page.evaluate("document.activeElement.id") == "query"
    assert "4 documents" in page.inner_text("#about")
    assert not page.is_visible("aside")  # nothing empty before a search
    search(page, "the moon turns")
    expected = search_database(database, HashEncoder(64), "the moon turns", SearchOptions())
    assert ids(page) == [hit.id for hit in expected]
    scores = page.locator("#results .score").all_text_contents()
    assert scores == [f"{hit.cosine:.3f}" for hit in expected]
    assert page.locator("#map .dot").count() == 4
    assert page.locator("#map .query").count() == 1
    assert "4 of 4 documents" in page.inner_text("#status")
    page.hover("#map .dot >> nth=2")
    assert page.locator("#results li.lit .id").all_text_contents() == [expected[2].id]
    page.check("#hybrid")
    page.click(".go")
    until(lambda: "words" in page.locator("#results .score").first.text_content())


def test_a_passage_in_a_browser(page):
    answered(page, source=EVIL, id="a#b.md#0123456789ab")
    search(page, "moon")
    assert page.inner_text("#results .source") == EVIL
    assert ids(page) == ["a#b.md"]  # a file's name says more than a hash
    assert page.get_attribute("#results .id", "title") == "a#b.md#0123456789ab"
    answered(page, id="a#b")  # a row's own id
    search(page, "sun")
    until(lambda: ids(page) == ["a#b"])


def test_passages_are_counted_as_passages(browser, passages):
    with served(passages) as address:
        page = browser.new_page()
        page.goto(address)
        search(page, "moon")
        assert page.inner_text("#about").startswith("2 passages · ")
        assert page.inner_text("#status").startswith("2 of 2 passages · ")
        page.fill("#where", "start = 0")
        page.click(".go")
        until(lambda: page.inner_text("#status").startswith("1 of 1 passage · "))
        page.fill("#where", "start < 0")
        page.click(".go")
        until(lambda: page.inner_text("#status") == "No passage passes the filter.")
        assert "document" not in page.inner_text("body")
        page.close()


def test_the_address_holds_the_search(page, browser, address):
    page.select_option("#task", "task:FiQA2018")
    page.fill("#where", "year > 2000")
    page.check("#hybrid")
    page.select_option("#count", "10")
    search(page, "bright moon & more")
    found, kept = ids(page), page.url
    assert kept.startswith(f"{address}/?q=bright+moon+%26+more&where=")
    page.select_option("#task", "own")
    page.fill("#task-own", "Mine")
    page.fill("#where", "")
    search(page, "soup")
    until(lambda: len(ids(page)) == 4)
    page.go_back()
    until(lambda: ids(page) == found)
    assert page.input_value("#query") == "bright moon & more"
    page.go_forward()
    until(lambda: len(ids(page)) == 4)
    assert page.input_value("#task-own") == "Mine"
    page.go_back()
    page.go_back()
    until(lambda: not page.is_visible("#found"))
    other = browser.new_page()
    other.goto(kept)
    other.wait_for_selector("#results li")
    assert ids(other) == found
    values = [other.input_value(f"#{name}") for name in ("where", "task", "count")]
    assert values == ["year > 2000", "task:FiQA2018", "10"]
    assert other.is_checked("#hybrid")
    other.goto(f"{address}/?q=moon&task=task:gone&n=7&where=")  # of another version
    other.wait_for_selector("#results li")
    assert [other.input_value(f"#{name}") for name in ("task", "count")] == ["default", "20"]
    other.close()


def answered(page, **fields) -> None:
    """The answer of a search is one hit."""
    hit = {"rank": 1, "id": "a.md#0", "cosine": 0.5, "words": None, "fused": None, "text": "t"}
    hit |= {"source": None, "cut": False, "fields": {}, "place": [0, 0]} | fields
    answer = {"hits": [hit], "query": [0, 0], "passing": 1, "encode_ms": 1, "search_ms": 1}
    page.route("**/api/search", lambda route: route.fulfill(json=answer))


def test_a_title_is_a_heading_and_an_address_a_link(page):
    fields = {"title": EVIL, "url": "https://example.com/a?b=1&c", "year": 1999}
    answered(page, text=f"{EVIL}\nabout the Moon's moons", fields=fields)
    search(page, "what is the moon")
    link = page.locator("#results h3 a")
    assert link.text_content() == EVIL
    assert link.get_attribute("href") == fields["url"]
    assert link.get_attribute("rel") == "noopener noreferrer"
    assert page.locator("#results .text").text_content() == "about the Moon's moons"
    assert page.locator("#results mark").all_text_contents() == ["moon", "Moon"]
    assert page.locator("#results .fields span").all_text_contents() == ["year: 1999"]
    assert page.title() == "db · nvembed search"


@pytest.mark.parametrize("url", ["javascript:alert(1)", "data:text/html,x", 7])
def test_only_addresses_of_the_web_are_links(page, url):
    answered(page, fields={"url": url, "title": 3})
    search(page, "moon")
    assert page.locator("#results a, #results h3").count() == 0
    assert page.locator("#results .fields span").all_text_contents() == ["title: 3", f"url: {url}"]


def test_on_a_phone_results_come_before_the_map(browser, address):
    page = browser.new_page(viewport={"width": 380, "height": 800})
    page.goto(address)
    search(page, "moon")
    first, plan = (page.locator(name).bounding_box() for name in ("#results", "aside"))
    assert first["y"] + first["height"] <= plan["y"]
    page.close()


def test_tasks_to_choose_from_are_of_retrieval(address):
    with urllib.request.urlopen(f"{address}/api/about") as answer:
        tasks = json.loads(answer.read())["tasks"]
    assert {task["type"] for task in tasks.values()} == {"Retrieval"}
    assert len(tasks) >= 15


def test_texts_stay_texts(page):
    search(page, "moon")
    assert EVIL in ids(page)
    assert EVIL in page.locator("#results .text").all_text_contents()
    assert page.locator("#results img, #results script, #map script").count() == 0
    assert page.title() == "db · nvembed search"


def test_filters_and_their_mistakes(page):
    page.fill("#where", "year > 'x'")
    page.fill("#query", "moon")
    page.press("#query", "Enter")
    until(lambda: page.inner_text("#where-error"))
    assert "expected a number for year" in page.inner_text("#where-error")
    assert page.get_attribute("#where", "aria-invalid") == "true"
    page.fill("#where", "year > 2000")
    page.press("#where", "Enter")
    page.wait_for_selector("#results li")
    assert set(ids(page)) == {"b", EVIL, "d"}
    assert page.inner_text("#where-error") == ""
    page.fill("#where", "")
    page.click("#chips >> text=open")
    assert page.input_value("#where") == "open = true"
    page.press("#where", "Enter")
    until(lambda: page.locator("#results li").count() == 1)
    assert ids(page) == ["d"]


def test_the_task_is_sent(page):
    assert page.inner_text("#task-note") == "Find it"
    with page.expect_request("**/api/search") as sent:
        search(page, "moon")
    assert sent.value.post_data_json["task"] is None
    page.select_option("#task", "task:FiQA2018")
    assert "financial question" in page.inner_text("#task-note")
    with page.expect_request("**/api/search") as sent:
        page.click(".go")
    assert sent.value.post_data_json["task"].startswith("Given a financial question")
    page.select_option("#task", "own")
    page.fill("#task-own", "Mine")
    with page.expect_request("**/api/search") as sent:
        page.press("#task-own", "Enter")
    assert sent.value.post_data_json["task"] == "Mine"


def test_by_keyboard_alone(page):
    search(page, "moon")
    for key, index in (("ArrowDown", 0), ("ArrowDown", 1), ("ArrowUp", 0)):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.dataset.index") == str(index)
    page.keyboard.press("Enter")
    assert page.locator("#results li.open").count() == 1
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "query"


@pytest.mark.parametrize("fails", [False, True])
def test_a_search_before_the_page_is_ready_waits(browser, address, fails):
    page = browser.new_page()
    held = []
    page.route("**/api/about", lambda route: held.append(route))
    page.goto(address)
    page.fill("#query", "moon")
    page.press("#query", "Enter")
    until(lambda: page.text_content("#status") == "Searching …")
    if fails:
        held[0].abort()
        until(lambda: page.text_content("#status") == "The server does not answer.")
    else:
        held[0].continue_()
        page.wait_for_selector("#results li")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_names(browser, address, scheme):
    page = browser.new_page(color_scheme=scheme, viewport={"width": 380, "height": 800})
    page.goto(address)
    search(page, "moon")
    # Wider than the screen, it would have to be pushed about.
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, select, button')].filter(e => "
        "!(e.labels && e.labels.length) && !e.ariaLabel && !e.textContent.trim()).length"
    )
    assert unnamed == 0
    pairs = page.evaluate(
        "['#about', '.text', '.score', '.id', '.fields span', '.go', '#status', '.note']"
        ".map(s => document.querySelector(s)).map(e => { let b = e; while "
        "(getComputedStyle(b).backgroundColor === 'rgba(0, 0, 0, 0)') b = b.parentElement; "
        "return [getComputedStyle(e).color, getComputedStyle(b).backgroundColor]; })"
    )
    for ink, paper in pairs:
        assert contrast(ink, paper) >= 4.5, (ink, paper)  # WCAG AA
    page.close()


def contrast(first: str, second: str) -> float:
    lights = sorted(_luminance(colour) for colour in (first, second))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").rstrip(")").split(",")]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))
