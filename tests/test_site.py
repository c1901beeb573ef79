"""The documentation as a site: links hold, nothing comes from elsewhere, and the search works without a server."""

import shutil
from pathlib import Path

import pytest

from docs.site_hooks import turned

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.parametrize(
    ("file", "written", "on_site"),
    [
        ("README.md", "![A picture](docs/demo.jpg)", "![A picture](demo.jpg)"),
        ("README.md", "[docs/tutorial.md](docs/tutorial.md)", "[Tutorial](tutorial.md)"),
        ("README.md", "[the loop](sst/train/trainer.py)", "the loop"),
        ("docs/cluster.md", "[RESULTS.md](../benchmarks/RESULTS.md#step)", "[RESULTS.md](results.md#step)"),
        ("docs/cluster.md", "[local](cluster/local.yaml)", "[local](cluster/local.yaml)"),
        ("docs/security.md", "[report](../SECURITY.md)", "[report](reporting.md)"),
        ("SECURITY.md", "[trust](docs/security.md)", "[trust](security.md)"),
        ("benchmarks/RESULTS.md", "[step](#step), [home](../README.md)", "[step](#step), [home](index.md)"),
        ("README.md", "[elsewhere](https://keepachangelog.com/)", "[elsewhere](https://keepachangelog.com/)"),
    ],
)
def test_links_of_the_repository_lead_to_pages_of_the_site(file, written, on_site):
    assert turned(written, file, {"tutorial.md": "Tutorial"}) == on_site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    return folder


def test_every_page_is_built_and_no_source_is(site):
    pages = {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")}
    assert pages | {"index.html", "contributing.html", "changelog.html"} <= {path.name for path in site.glob("*.html")}
    assert not list(site.rglob("*.py"))


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_from_a_disk_the_search_finds_and_no_page_asks_the_network(site):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"file://{site}/tutorial.html")
        page.locator("[data-md-component=search-query]").press_sequentially("equivariance")  # it listens to keys
        page.wait_for_selector(".md-search-result__link[href*='concepts.html']", state="attached")
        browser.close()
    assert errors == []
    assert len(asked) > 3 and [url for url in asked if not url.startswith(("file:", "data:", "about:"))] == []
