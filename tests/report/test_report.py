"""The report: facts and warnings from plain arrays, and the page as a browser shows it."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from sst.report.advice import landmark_facts, warnings_of
from sst.report.report import ReportFigure, write_report
from sst.train.run_directory import LandmarkRecord, RunDirectory

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

SHAPE = np.array([[90, 90], [160, 90], [128, 130], [100, 170], [150, 170], [40, 40], [92, 91]], float)


def predictions(count: int = 80, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Five firm landmarks that move together, a sixth that stays where the frame is, a twin of the first."""
    rng = np.random.default_rng(seed)
    turn = np.eye(2) + rng.normal(0, 0.15, (count, 2, 2))
    points = (SHAPE - 128) @ turn + 128 + rng.normal(0, 25, (count, 1, 2)) + rng.normal(0, 1, (count, 7, 2))
    points[:, 5] = SHAPE[5]
    return points, np.full((count, 7), 0.8)


RECORD = LandmarkRecord(
    images=80, repeatability=[0.9] * 6 + [0.5], partner=[1, 0, 2, 4, 3, -1, -1], swap_share=[0.12, 0.1, 0, 0, 0, 0, 0]
)
ROUNDS = [
    {"round": 0, "made_by": "keypoints", "labels_per_image": 21.0},
    {"round": 1, "made_by": "correspondence", "labels_per_image": 6.0, "label_persistence": 0.4},
    {"round": 2, "made_by": "merge", "labels_per_image": 3.0},
]


def test_a_landmark_of_the_background_is_told_from_those_that_move_together():
    facts = landmark_facts(*predictions(), 0.4, None)
    assert facts.looseness[5] > 0.1 > 0.02 > facts.looseness[:5].max()
    assert facts.outside[5] > 0.9
    assert facts.twins == ((0, 6),)


def test_invisible_landmarks_have_no_looseness_and_draw_nothing_along():
    points, confidence = predictions()
    confidence[:, 5] = 0.1
    facts = landmark_facts(points, confidence, 0.4, None)
    assert np.isnan(facts.looseness[5]) and facts.visible[5] == 0 and facts.confidence[5] == 0
    assert facts.looseness[:5].max() < 0.01


def test_every_trouble_is_named_with_its_landmarks_and_a_setting_to_turn():
    confidence = predictions()[1]
    confidence[:70, 3] = 0.1
    found = warnings_of(landmark_facts(predictions()[0], confidence, 0.4, RECORD), ROUNDS, 12, 240)
    text = "\n".join(f"{warned.text} {warned.advice} {warned.landmarks}" for warned in found)
    for said in (
        "7 landmarks came out where 12 were wanted",
        "Labels per image fell from 21 to 6",
        "Only 40 % of the labels outlived",
        "Landmark 5: ",
        "Left/right pairs that swap: 0 and 1 (12 % of the images).",
        "stage2.flip_share",
        "Landmarks that name the same place in most images: 0 and 6.",
        "Landmark 6: 50.0 % of warped images only",
        "Landmark 3: 12.5 % of the images only",
        "240 training images are few",
    ):
        assert said in text
    assert {k for warned in found for k in warned.landmarks} == {0, 1, 3, 5, 6}


def test_a_sound_run_has_no_warning():
    points, confidence = predictions()
    calm = [entry | {"labels_per_image": 20.0, "label_persistence": 0.8} for entry in ROUNDS]
    assert warnings_of(landmark_facts(points[:, :5], confidence[:, :5], 0.4, None), calm, 5, 3000) == []


def test_without_any_visible_landmark_that_is_all_that_is_said():
    facts = landmark_facts(predictions()[0], np.zeros((80, 7)), 0.4, None)
    assert [warned.text for warned in warnings_of(facts, ROUNDS, 7, 3000)] == ["No landmark is visible on any image."]


def picture(name: str) -> ReportFigure:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(buffer, "PNG")
    return ReportFigure(name, "A caption.", buffer.getvalue())


@pytest.fixture
def page_url(tmp_path) -> str:
    facts = landmark_facts(*predictions(), 0.4, RECORD)
    figures = [picture("landmarks"), *(picture(f"landmark_{k:02d}") for k in range(7))]
    warnings = warnings_of(facts, ROUNDS, 7, 3000)
    write_report(
        RunDirectory(str(tmp_path)), title="Landmarks of <owls>", summary={"landmarks": "7"}, figures=figures,
        rounds=ROUNDS, settings={"seed": 0}, facts=facts, warnings=warnings,
    )  # fmt: skip
    return (tmp_path / "report.html").as_uri()


@pytest.fixture
def page(page_url):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800}, offline=True)
        page.troubles = []
        page.on("console", lambda message: page.troubles.append(message.text))
        page.on("pageerror", lambda error: page.troubles.append(str(error)))
        page.on(
            "request", lambda request: request.url.startswith(("file:", "data:")) or page.troubles.append(request.url)
        )
        page.goto(page_url)
        yield page
        browser.close()


def shown(page) -> list[int]:
    return page.evaluate("[...document.querySelectorAll('#gallery figure:not([hidden])')].map(f => +f.dataset.number)")


def test_the_page_works_in_a_browser_on_a_phone_without_network(page):
    assert page.title() == "Landmarks of <owls>"
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.troubles == []


def test_filters_and_order_work(page):
    assert shown(page) == list(range(7))
    page.check("input[value=warned]")
    assert shown(page) == [0, 1, 5, 6] and page.inner_text("#shown") == "4 of 7 landmarks"
    page.check("input[value=steady]")
    assert shown(page) == [2, 3, 4]
    page.check("input[value=all]")
    page.select_option("#order", "loose")
    assert shown(page)[-1] == 5
    page.select_option("#order", "number")
    assert shown(page) == list(range(7)) and page.troubles == []


def test_a_link_from_a_warning_shows_its_landmark_whatever_the_filter(page):
    page.check("input[value=steady]")
    page.click("a[href='#landmark_05']")
    page.wait_for_function("!document.getElementById('landmark_05').hidden")
    assert 5 in shown(page)


def test_everything_can_be_reached_by_keyboard(page):
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("document.activeElement.name || document.activeElement.id || document.activeElement.tagName")
        )
    assert {"show", "order", "SUMMARY", "A"} <= reached
    page.focus("input[value=all]")
    page.keyboard.press("ArrowRight")
    assert shown(page) == [2, 3, 4]
