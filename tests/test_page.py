import re
import shutil
import tempfile

import numpy as np
import pytest

from jdmdr import page, pictures, workdir

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1200,900",
)  # fmt: skip


@pytest.fixture(scope="module")
def html(finished):
    return (finished.directory / "report" / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser():
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("looks at the page in Chromium: install chromium and chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        yield driver
        driver.quit()


def test_the_page_needs_nothing_but_itself(html):
    assert not re.search(r'(?:src|href)="(?!#)', html.replace("xlink:href", "").replace('href="#', ""))
    assert "url(http" not in html and "@import" not in html


def test_the_page_holds_the_figures_of_the_metrics_and_every_stage(finished, html):
    metrics = workdir.read_json(finished.directory / "evaluate" / "metrics.json")
    for split, found in metrics.items():
        part = html[html.index(f'id="results-{split}"') :]
        for system, of in found["systems"].items():
            row = re.search(rf'<tr><td class="words">{system}</td>(.*?)</tr>', part, re.S)[1]
            assert f"{of['ndcg@10']['avg']:.3f}" in row and f"{of['recall@100']['avg']:.3f}" in row
    for path in finished.directory.glob("*/manifest.json"):
        if path.parent.name != "report":
            assert f"<strong>{path.parent.name}</strong>" in html


def test_the_worst_queries_are_those_where_another_system_does_better(finished):
    split = finished.splits[0]
    found = page._worst(finished, split)
    for group in found["groups"]:
        losses = [query["own"] - query["best"] for query in group["queries"]]
        assert losses == sorted(losses) and len(losses) == page.WORST
        for query in group["queries"]:
            qrels = finished.library.qrels(group["lang"], split.qrels)[query["qid"]]
            assert qrels[query["positive"]["docid"]] > 0
            assert all(qrels.get(hit["docid"], 0) <= 0 for hit in query["instead"])


def test_a_picture_takes_the_pages_colours_and_shares_no_id_with_another():
    drawn = [
        pictures.bars(name, ["en", "sw"], {"bm25": [0.5, 0.6], "dmdr": [0.7, 0.8]}, "nDCG@10") for name in ("a", "b")
    ]
    assert drawn[0] == pictures.bars("a", ["en", "sw"], {"bm25": [0.5, 0.6], "dmdr": [0.7, 0.8]}, "nDCG@10")
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in drawn]
    assert ids[0] and not ids[0] & ids[1]
    for svg in drawn:
        assert "currentColor" in svg and pictures.INK not in svg and pictures.GRID not in svg
        used = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", svg))
        assert used <= set(re.findall(r'\bid="([^"]+)"', svg))


def test_equal_runs_give_equal_bytes(finished, html, tmp_path):
    page.write(finished, tmp_path / "report.html")
    # the manifest of the report itself came after the page
    again = (tmp_path / "report.html").read_text(encoding="utf-8")
    cut = [text[: text.index('<h2 id="manifest">')] for text in (html, again)]
    assert cut[0] == cut[1]


def open_page(browser, path):
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(path.as_uri())


def column(table, index):
    return [row.find_elements("tag name", "td")[index].text for row in table.find_elements("css selector", "tbody tr")]


def test_in_a_browser_the_page_is_quiet_and_a_heading_sorts_by_number(finished, browser):
    open_page(browser, finished.directory / "report" / "report.html")
    assert browser.get_log("browser") == []
    asked = re.findall(r'"url":"(\w+):', "".join(entry["message"] for entry in browser.get_log("performance")))
    assert not {"http", "https", "ws", "wss", "ftp"} & set(asked) and "file" in asked
    table = next(t for t in browser.find_elements("css selector", "#negatives ~ div table"))
    headings = table.find_elements("css selector", "th button")
    index = next(i for i, h in enumerate(headings) if h.text == "candidates")
    before = [int(v.replace(",", "")) for v in column(table, index)]
    headings[index].click()
    assert [int(v.replace(",", "")) for v in column(table, index)] == sorted(before, reverse=True)
    headings[index].click()
    assert [int(v.replace(",", "")) for v in column(table, index)] == sorted(before)
    headings[0].click()
    assert column(table, 0) == sorted(column(table, 0))


def test_numbers_sort_as_numbers_and_missing_ones_last(browser, tmp_path, html):
    script = re.search(r"<script>.*?</script>", html, re.S)[0]
    cells = "".join(f'<tr><td data-value="{v}">{v}</td></tr>' for v in ("9", "10", "None", "-2"))
    head = '<th scope="col"><button type="button">n</button></th>'
    (tmp_path / "t.html").write_text(
        f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table>{script}'
    )
    open_page(browser, tmp_path / "t.html")
    browser.find_element("css selector", "th button").click()
    assert column(browser.find_element("css selector", "table"), 0) == ["10", "9", "-2", "None"]


def test_dark_mode_turns_the_page_and_its_pictures_dark(finished, browser):
    open_page(browser, finished.directory / "report" / "report.html")

    def colours(scheme):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        wanted = "return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('svg text')).fill]"
        return [np.mean(list(map(int, re.findall(r"\d+", c)[:3]))) for c in browser.execute_script(wanted)]

    (light, ink), (dark, chalk) = colours("light"), colours("dark")
    assert light > 200 > 100 > ink and dark < 100 < 200 < chalk


def test_texts_are_escaped_and_right_to_left_where_their_language_is(finished, browser, tmp_path, monkeypatch):
    hostile = '<script>document.title = "owned"</script>'
    gathered = page.gather(finished)
    query = gathered["worst"][0]["groups"][0]["queries"][0]
    query["text"], query["positive"]["text"] = hostile, "\u0645\u0627 \u0647\u0648"
    gathered["worst"][0]["groups"][0]["lang"] = "ar"
    monkeypatch.setattr(page, "gather", lambda recipe: gathered)
    page.write(finished, tmp_path / "report.html")
    open_page(browser, tmp_path / "report.html")
    asked = browser.find_element("css selector", ".asked bdi")
    assert asked.text == hostile and "owned" not in browser.title
    assert asked.get_attribute("dir") == "rtl" and asked.get_attribute("lang") == "ar"
    other = browser.find_elements("css selector", "details bdi[lang=sw]")[0]
    assert other.get_attribute("dir") == "auto"
