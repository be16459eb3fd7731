"""The report in a browser: what is heard, what keys do, and that nothing is cut, fetched or unreadable."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.conftest import RECIPES
from tests.test_benchmark import row
from tests.test_report import scored, timed
from wavedistill.recipe.loading import load_recipe
from wavedistill.reporting.page import Clip, Version, render
from wavedistill.reporting.spectrogram import picture
from wavedistill.stages.report import _flac

playwright = pytest.importorskip("playwright.sync_api", reason="the report's tests steer a browser by playwright")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: apt-get install chromium")
SECONDS = 60.0
"""Of silence: longer than any step of a test takes on a busy machine."""
OVERHEAR = """const plain = GainNode; window.gains = [];
    window.GainNode = class extends plain { constructor(...how) { super(...how); gains.push(this); } };"""
"""Keeps what sets how loud each sound is."""
MOVE = "(slider, to) => { slider.value = to; slider.dispatchEvent(new Event('input')); }"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two clips; one student that fails a check, each figure made up."""
    recipe = load_recipe(RECIPES / "tiny.toml")
    version = Version(
        _flac(np.zeros(int(SECONDS * 16000), np.int16), 16000), picture(np.zeros((8, 8), np.float32), 0.0)
    )
    systems = {"recorded": [version], "student": [version, version], "griffin_lim": [version, version]}
    figure = Figure(figsize=(3.6, 2.3))
    figure.subplots().plot([1, 2])
    table = timed(row("naive", 100, note="20 only"), row("compiled", 80000), row("parallel", 160000))
    path = tmp_path_factory.mktemp("report") / "report.html"
    page = render(
        recipe,
        scored(recipe, level_difference_db=-4.0),
        table,
        timed(row("compiled", 40000), *(row("streamed", 96e9 / f, flops=f, trained=False) for f in (1e6, 2e6, 4e6))),
        {"summary": ["The training of the student takes a while."]},
        licence="by Jane Doe",
        stale=["benchmark_old.json"],
        losses={"teacher": {"nll": figure}, "student": {"kl": figure, "a term of one's own": figure}, "lost": {}},
        clips=[Clip(f"a/rather/long/folder/of/recordings/number_{i}.wav", SECONDS, systems) for i in range(2)],
    )
    path.write_text(page, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright.expect.set_options(timeout=30_000)
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[Any]:
    """Opens the report with the settings of a browser's context, once its sounds are decoded."""
    contexts = []

    def visit(**settings: Any) -> Any:
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.problems, page.asked = [], []
        page.on("console", lambda message: page.problems.append(message.text))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.add_init_script(OVERHEAR)
        page.goto(report.as_uri())
        if settings.get("java_script_enabled", True):
            playwright.expect(page.locator(".clip[data-ready]")).to_have_count(2)
        return page

    yield visit
    for context in contexts:
        context.close()


def position(clip: Any) -> float:
    return float(clip.get_by_role("slider", name="Position").input_value())


def only(page: Any, which: int) -> None:
    """Waits until one of the sounds that run is heard, and no other: a switch fades."""
    page.wait_for_function("which => gains.every((gain, i) => gain.gain.value > 0.01 === (i === which))", arg=which)


def heard(clip: Any) -> str:
    (system,) = clip.locator(".system[aria-pressed=true] b").all_inner_texts()
    return system


def test_the_page_is_whole_and_quiet(opened: Any, report: Path) -> None:
    page = opened()
    assert not page.problems
    assert {url for url in page.asked if not url.startswith("data:")} == {report.as_uri()}
    assert page.locator(".clock").all_inner_texts() == ["0.0 / 60.0 s"] * 2
    assert "60.0 s" in re.search(r'class="clock">.*', report.read_text()).group(), "before any sound is decoded"
    heading = page.get_by_role("heading", level=1).inner_text()
    assert heading.startswith(
        "The student is not to be called good: it fails 1 of 7 quality checks. It speaks 10 times"
    )
    (failed,) = page.locator(".failed").all()
    assert failed.text_content() == "As loud: failed off by 4.0 dB; 3 dB allowed"


def test_switching_keeps_the_position_and_one_clip_plays_at_a_time(opened: Any) -> None:
    page = opened()
    first, second = (page.get_by_role("group", name=f"Clip {n}", exact=True) for n in (1, 2))
    assert heard(first) == "Student"
    first.get_by_role("slider").evaluate(MOVE, 20)
    first.get_by_role("button", name="Play: Student").click()
    page.wait_for_function("document.querySelector('.seek').value > 20.1")
    before = position(first)
    only(page, 1)  # of recorded, student twice, Griffin-Lim twice
    first.get_by_role("button", name="Griffin-Lim").click()
    assert heard(first) == "Griffin-Lim"
    assert before <= position(first) < 40, "it goes on where it was"
    only(page, 3)
    first.get_by_role("button", name="As drawn").click()
    only(page, 4)
    assert first.locator("img:not([hidden])").count() == 3, "one picture a system"
    assert first.locator("img:not([hidden])").nth(1).get_attribute("alt") == "Spectrogram: Student, as drawn"
    assert first.locator("img:not([hidden])").nth(0).get_attribute("alt") == "Spectrogram: Recorded"
    second.get_by_role("button", name="Recorded").click()
    playwright.expect(page.locator("[data-playing]")).to_have_count(1)
    playwright.expect(second.get_by_role("button", name="Pause: Recorded")).to_be_visible()
    stopped = position(first)
    page.wait_for_timeout(200)
    assert position(first) == stopped > before
    assert not page.problems


def test_a_spectrogram_is_a_place_to_point_at(opened: Any) -> None:
    page = opened()
    clip = page.locator(".clip").first
    lane = clip.locator(".picture").nth(2)
    box = lane.bounding_box()
    lane.click(position={"x": box["width"] / 4, "y": 10})
    assert position(clip) == pytest.approx(SECONDS / 4, abs=0.2)
    assert heard(clip) == "Griffin-Lim"
    at = clip.evaluate("clip => getComputedStyle(clip.querySelector('.picture'), '::after').left")
    assert float(at.removesuffix("px")) == pytest.approx(box["width"] / 4, abs=2), "the cursor of every lane"


def test_keys_play_move_and_switch(opened: Any) -> None:
    page = opened()
    clip = page.locator(".clip").first
    page.keyboard.press("3")
    assert heard(clip) == "Student", "no player was used yet"
    clip.get_by_role("slider").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert position(clip) == pytest.approx(0.25)
    page.keyboard.press("ArrowUp")
    assert heard(clip) == "Recorded"
    page.keyboard.press("3")
    assert heard(clip) == "Griffin-Lim"
    page.keyboard.press("d")
    assert clip.get_by_role("button", name="As drawn").get_attribute("aria-pressed") == "true"
    page.keyboard.press("l")
    assert clip.get_by_role("button", name="Loop").get_attribute("aria-pressed") == "true"
    page.keyboard.press(" ")
    playwright.expect(page.locator("[data-playing]")).to_have_count(1)
    assert 0.25 <= position(clip) < 30, "from where it stands"
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("1")
    assert heard(clip) == "Recorded", "the last player, from anywhere"
    page.keyboard.press(" ")
    playwright.expect(page.locator("[data-playing]")).to_have_count(0)


def test_a_clip_ends_where_it_ends_and_a_loop_begins_again(opened: Any) -> None:
    page = opened()
    clip = page.locator(".clip").first
    for loops in (False, True):
        clip.get_by_role("slider").evaluate(MOVE, SECONDS - 0.2)
        clip.locator(".play").click()
        page.wait_for_function("document.querySelector('.seek').value < 50")
        playwright.expect(page.locator("[data-playing]")).to_have_count(int(loops))
        clip.get_by_role("button", name="Loop").click()


def test_nothing_is_cut_on_a_phone(opened: Any) -> None:
    """Also what opens when asked for: no element reaches beyond the page, which does not scroll sideways."""
    page = opened(viewport={"width": 360, "height": 740})
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    beyond = """[...document.querySelectorAll('main *')]
        .filter(each => !each.closest('.unseen, .stack thead, svg') && each.getBoundingClientRect().right > 360)
        .map(each => each.outerHTML.slice(0, 80))"""
    assert page.evaluate(beyond) == []
    scrolling = "[...document.querySelectorAll('main *')].filter(each => getComputedStyle(each).overflowX === 'auto')"
    assert page.evaluate(f"{scrolling}.length") == 0


def test_dark_is_dark_in_plots_too(opened: Any) -> None:
    def colours(scheme: str) -> dict[str, str]:
        return opened(color_scheme=scheme).evaluate(
            """() => Object.fromEntries([
                ["page", document.body, "backgroundColor"], ["text", document.body, "color"],
                ["plot's text", document.querySelector(".plot text"), "fill"],
                ["plot's line", [...document.querySelectorAll(".plot path")]
                    .find(each => each.getAttribute("style").includes("series-1")), "stroke"],
                ["failed", document.querySelector(".failed b"), "color"],
            ].map(([name, element, key]) => [name, getComputedStyle(element)[key]]))"""
        )

    light, dark = colours("light"), colours("dark")
    assert [name for name in light if light[name] == dark[name]] == []
    for found, darker, lighter in ((light, "text", "page"), (dark, "page", "text")):
        assert brightness(found[darker]) + 150 < brightness(found[lighter])
        assert found["plot's text"] == found["text"]


def brightness(colour: str) -> float:
    """Mean of "rgb(r, g, b)"."""
    return float(np.mean([int(part) for part in re.findall(r"\d+", colour)[:3]]))


def test_everything_has_a_name(opened: Any) -> None:
    page = opened()
    for role in ("button", "slider", "table", "img", "group"):
        assert page.get_by_role(role).count() > 0
    unnamed = """[...document.querySelectorAll("button, input, img, audio")].filter(
        each => !(each.getAttribute("aria-label") ?? each.getAttribute("alt") ?? each.textContent).trim())"""
    assert page.evaluate(f"{unnamed}.length") == 0
    assert page.get_by_role("row", name=re.compile("^PESQ.*Predicts how good")).get_by_role("cell").count() == 3
    page.keyboard.press("Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "what has the focus shows it"


def test_without_a_script_there_are_the_browsers_own_players(opened: Any) -> None:
    page = opened(java_script_enabled=False)
    assert page.locator("audio").count() == 10
    assert all(player.is_visible() for player in page.locator("audio").all())
    assert not page.locator(".transport").first.is_visible()
