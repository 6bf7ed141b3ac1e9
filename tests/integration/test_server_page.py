"""``/docs``: what it asks for, and what Chromium shows and does with it."""

from __future__ import annotations

import json
import re
import shutil
import urllib.request
from collections.abc import Iterator

import pytest

from hash_encoder import HashEncoder
from nvembed.serving.middleware import ApiKeys
from serving_fakes import WIDTH, HeldEngine, make_config, running

KEY = "k" * 20


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running(HeldEngine(), make_config(), ApiKeys({"me": KEY})) as port:
        yield f"http://127.0.0.1:{port}"


def test_the_page_asks_for_nothing_from_elsewhere(address: str) -> None:
    with urllib.request.urlopen(f"{address}/docs", timeout=10) as answer:  # needs no key
        html, headers = answer.read().decode(), answer.headers
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "connect-src 'self'" in headers["content-security-policy"]
    assert "//" not in re.sub(r"\s// .*", "", html)  # no address; a comment is none
    assert not re.search(r"\b(src|innerHTML|@import|url\()", html)


def test_a_request_from_the_page(address: str) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("needs Chromium (Debian: apt install chromium)")
    asked: list[str] = []
    problems: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(f"{address}/docs")
        page.wait_for_selector("details")
        with urllib.request.urlopen(f"{address}/openapi.json", timeout=10) as answer:
            paths = json.load(answer)["paths"]
        shown = page.locator("summary").all_inner_texts()
        assert shown == [f"{m.upper()} {path}" for path, ms in paths.items() for m in ms]
        route = page.locator("details").nth(shown.index("POST /v1/embeddings"))
        route.locator("summary").click()
        assert "retrieval.query" not in route.inner_text()  # descriptions, not documentation
        assert "output_dtype" in route.inner_text()
        route.locator("button").click()
        # The page forbids to evaluate strings, as wait_for_function does.
        playwright.expect(route.locator("pre")).to_contain_text(re.compile("^401"), timeout=20_000)
        page.fill("#key", KEY)
        route.locator("textarea").fill(json.dumps({"input": "a b", "dimensions": WIDTH}))
        route.locator("button").click()
        playwright.expect(route.locator("pre")).to_contain_text(re.compile("^200"), timeout=20_000)
        answer = json.loads(route.locator("pre").inner_text().partition("\n")[2])
        browser.close()
    oracle = HashEncoder(WIDTH).encode_document(["a b"])[0]
    assert answer["data"][0]["embedding"] == pytest.approx(oracle.tolist(), abs=1e-6)
    assert {url.removeprefix(address) for url in asked} == {
        "/docs",
        "/openapi.json",
        "/v1/embeddings",
    }
    assert not problems
