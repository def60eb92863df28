"""The pages in a real browser: Debian's chromium, on files, as somebody opens them with a double click."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from vacli.store.labels import ccc_of_tracks

from .opened_pages import HOSTILE, RATE_HZ, ROWS, SPIKE_ROW, Opened, a_curve, write_folder, write_labels

PAGES = ("index", "plain", "labelled", "two", "vfr", "lost", "unplayable", *HOSTILE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pages"))


@pytest.fixture
def opened(browser, folder):
    return lambda name, **looks: Opened(browser, folder / f"{name}.html", **looks)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_opens_without_an_error_and_asks_for_files_only(opened, name):
    with opened(name) as it:
        if name in HOSTILE:
            it.video_is_ready()
        if name != "index":
            it.until("vacli.page.curves.drawn_ms > 0")
        assert it.said == []
        assert it.asked
        assert {url.split(":")[0] for url in it.asked} == {"file"}


def test_a_page_cannot_reach_the_network(opened):
    with opened("plain") as it:
        tried = "fetch('https://example.com/').then(() => 'out', () => 'refused')"
        assert it.js(tried) == "refused"
        added = it.js("""new Promise((go) => { const image = new Image();
            image.onload = () => go('out');
            image.onerror = () => go('refused');
            image.src = 'https://example.com/a.png'; })""")
        assert added == "refused"
        it.js("document.body.insertAdjacentHTML('beforeend', '<img src=data:x onerror=\"window.ran = 1\">')")
        it.page.wait_for_timeout(50)
        assert it.js("window.ran") is None
        assert it.refused == {"https://example.com/a.png": "csp"}


@pytest.mark.parametrize("time_s", [0.5, 2.7, 5.5])
def test_a_click_on_a_curve_moves_the_video_there(opened, time_s):
    with opened("plain") as it:
        it.video_is_ready()
        it.at("arousal", time_s)
        it.until("!document.getElementById('video').seeking")
        assert it.js("document.getElementById('video').currentTime") == pytest.approx(time_s, abs=0.1)
        assert it.js("vacli.page.now_s") == pytest.approx(time_s, abs=0.1)
        assert it.shade() == pytest.approx(
            40 + time_s * RATE_HZ, abs=4
        )  # the picture itself is the one of then


def test_a_drag_takes_the_video_along(opened):
    with opened("plain") as it:
        it.video_is_ready()
        box = it.page.locator("#valence .u-over").bounding_box()
        it.page.mouse.move(box["x"] + it.x_of(1), box["y"] + 50)
        it.page.mouse.down()
        for time_s in np.linspace(1, 4.4, 30):
            it.page.mouse.move(box["x"] + it.x_of(float(time_s)), box["y"] + 50)
        it.page.mouse.up()
        it.until("Math.abs(document.getElementById('video').currentTime - 4.4) < 0.1")
        assert it.shade() == pytest.approx(40 + 4.4 * RATE_HZ, abs=4)


def test_playing_moves_the_playhead(opened):
    with opened("plain") as it:
        it.video_is_ready()
        before = it.page.locator("#valence .playhead").bounding_box()["x"]
        it.page.locator("#play").click()
        it.until("vacli.page.now_s > 0.6")
        assert it.page.locator("#play").text_content() == "Pause"
        it.page.locator("#play").click()
        video = "document.getElementById('video')"
        it.until(
            f"{video}.paused && Math.abs(vacli.page.now_s - {video}.currentTime) < 1e-3"
        )  # all is at rest
        now_s = it.js("vacli.page.now_s")
        moved = it.page.locator("#valence .playhead").bounding_box()["x"] - before
        assert moved == pytest.approx(it.x_of(now_s) - it.x_of(0), abs=2)
        assert it.page.locator("#frame").text_content() == str(it.js("vacli.page.row") + 1)


def test_the_players_own_controls_move_the_playhead(opened):
    with opened("plain") as it:
        it.video_is_ready()
        it.js("document.getElementById('video').currentTime = 3.3")
        it.until("Math.abs(vacli.page.now_s - 3.3) < 0.05")
        assert it.page.locator("#unseen").is_visible()  # 3 to 4 s is without a face


def test_a_stretch_without_a_face_is_shaded(opened):
    with opened("plain", color_scheme="light") as it:
        it.until("vacli.page.curves.drawn_ms > 0")
        pixel = """(t) => { const u = vacli.page.curves.panels[1].plot, x = Math.round(u.valToPos(t, 'x', true));
            const found = u.ctx.getImageData(x, Math.round(u.valToPos(-0.9, 'y', true)), 12, 1).data;
            return Math.max(...[...found].map((v, i) => (i % 4 === 3 ? v : 0))); }"""
        painted = {t: it.page.evaluate(pixel, t) for t in (0.5, 2.7, 3.1, 3.5, 3.85, 4.4, 5.5)}
        assert {t for t, alpha in painted.items() if alpha} == {3.1, 3.5, 3.85}
        assert it.page.locator("#legend-gap").is_visible()
    with opened("vfr") as it:  # a face throughout
        assert it.page.locator("#legend-gap").is_hidden()
        assert it.js("vacli.page.curves.gaps_drawn") == []


@pytest.mark.parametrize("own_id", HOSTILE)
def test_a_hostile_name_is_text_and_its_video_plays(opened, own_id):
    name = HOSTILE[own_id]
    with opened("index") as it:
        it.page.locator("#videos a", has_text=name).click()
        it.video_is_ready()
        assert it.page.title() == name
        assert it.page.locator("h1").text_content() == name
        it.page.locator("#play").click()
        it.until("document.getElementById('video').currentTime > 0.2 && vacli.page.now_s > 0.2")
        assert it.said == []


def test_keys_do_what_the_mouse_does(opened):
    with opened("plain") as it:
        it.video_is_ready()
        press, row = it.page.keyboard.press, lambda: it.js("vacli.page.row")
        press("ArrowRight")
        press("ArrowRight")
        assert row() == 2
        press("ArrowLeft")
        assert row() == 1
        press("Shift+ArrowRight")
        assert row() == 1 + RATE_HZ
        press("End")
        assert row() == ROWS - 1
        it.until("Math.abs(document.getElementById('video').currentTime - 5.96) < 0.05")
        press("Home")
        assert row() == 0
        press("Space")
        it.until("!document.getElementById('video').paused && vacli.page.now_s > 0.1")
        press("Space")
        it.until("document.getElementById('video').paused")
        it.page.locator("#video").focus()
        press("Space")  # once, not by the page and by the player's own controls
        it.page.wait_for_timeout(100)
        assert not it.js("document.getElementById('video').paused")
        press("+")
        assert it.js("vacli.page.curves.is_zoomed()")
        press("0")
        assert not it.js("vacli.page.curves.is_zoomed()")


def test_a_jump_that_waits_for_another_does_not_fall_back_when_that_one_ends(opened):
    with opened("plain") as it:
        it.video_is_ready()
        now_s = it.js("""(() => { const video = document.getElementById('video');
            const jumps = (on) => Object.defineProperty(video, 'seeking', { configurable: true, get: () => on });
            jumps(true); vacli.page.seek(3); jumps(false);
            video.dispatchEvent(new Event('timeupdate')); // comes before `seeked`
            return vacli.page.now_s; })()""")
        assert now_s == 3


def test_the_slider_is_one_for_the_keyboard_too(opened):
    with opened("plain") as it:
        it.video_is_ready()
        slider = it.page.get_by_role("slider", name="Time in the video")
        slider.focus()
        it.page.keyboard.press("ArrowUp")
        assert it.js("vacli.page.row") == 1
        slider.fill("2.5")
        it.until("Math.abs(document.getElementById('video').currentTime - 2.5) < 0.1")
        said = slider.get_attribute("aria-valuetext")
        valence, arousal = (f"{v:.2f}".replace("-", "\u2212") for v in a_curve().track.values[62])
        assert said == f"0:02.50, valence {valence}, arousal {arousal}"
        assert it.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        it.page.keyboard.press("Space")
        it.until("vacli.page.now_s > 2.8")
        assert slider.get_attribute("aria-valuetext") == said  # it is not talked through a film
        assert it.js("document.querySelectorAll('[aria-live], [role=status] #now, output').length") == 0


def test_every_control_is_reached_by_tab_and_shows_it(opened):
    with opened("two") as it:
        reached = []
        for _ in range(30):
            it.page.keyboard.press("Tab")
            found = it.js("""(() => { const e = document.activeElement, l = e.closest('label') || e;
                return [e.id || e.name || e.tagName, getComputedStyle(l).outlineStyle]; })()""")
            if reached and found[0] == "BODY":
                break
            reached.append(found)
        names = [name for name, _ in reached]
        assert {"person", "video", "play", "out", "in", "whole", "time", "SUMMARY"} <= set(names)
        assert {outline for name, outline in reached if name not in ("video", "BODY")} <= {"solid", "auto"}


def test_zoom_by_shift_drag_wheel_buttons_and_back_by_double_click(opened):
    with opened("plain") as it:
        box = it.page.locator("#valence .u-over").bounding_box()
        y = box["y"] + 40
        view = lambda: it.js("[vacli.page.curves.view.min, vacli.page.curves.view.max]")  # noqa: E731
        it.page.keyboard.down("Shift")
        it.page.mouse.move(box["x"] + it.x_of(1), y)
        it.page.mouse.down()
        it.page.mouse.move(box["x"] + it.x_of(3), y, steps=4)
        it.page.mouse.up()
        it.page.keyboard.up("Shift")
        assert view() == pytest.approx([1, 3], abs=0.05)
        assert it.js("vacli.page.now_s") == 0  # that was no seek
        it.page.keyboard.down("Control")
        it.page.mouse.wheel(0, -200)
        it.page.keyboard.up("Control")
        it.until("vacli.page.curves.view.max - vacli.page.curves.view.min < 1.9")
        it.page.locator("#valence .u-over").dblclick(position={"x": 200, "y": 60})
        assert view() == pytest.approx([0, 5.96])
        it.page.locator("#in").click()
        span = np.diff(view())[0]
        assert span == pytest.approx(5.96 / 2)
        it.page.locator("#out").click()
        assert np.diff(view())[0] == pytest.approx(5.96)
        it.page.locator("#in").click()
        it.page.locator("#whole").click()
        assert view() == pytest.approx([0, 5.96])


def test_a_zoomed_view_follows_the_video(opened):
    with opened("plain") as it:
        it.video_is_ready()
        it.js("vacli.page.curves.show(0, 0.5)")
        it.page.locator("#play").click()
        it.until("vacli.page.now_s > 0.8")
        least, most, now_s = it.js(
            "[vacli.page.curves.view.min, vacli.page.curves.view.max, vacli.page.now_s]"
        )
        assert most - least == pytest.approx(0.5)
        assert least <= now_s <= most + 0.05


def test_hovering_tells_the_exact_values(opened):
    with opened("labelled") as it:
        curve = a_curve()
        it.page.locator("#valence .u-over").hover(position={"x": it.x_of(2.0), "y": 60})
        said = it.page.locator("#tip").text_content()
        valence, arousal = (f"{v:.3f}".replace("-", "\u2212") for v in curve.track.values[50])
        assert said.splitlines()[0] == "0:02.00  frame 51"
        assert f"Valence {valence} ± 0.150" in said
        assert f"Arousal {arousal} ± 0.150" in said
        it.page.mouse.move(5, 5)
        assert it.page.locator("#tip").is_hidden()


def test_labels_and_ccc_stand_beside_the_estimates(opened, tmp_path):
    curve = a_curve()
    rated = write_labels(tmp_path / "labels.txt", curve)
    valence, arousal = ccc_of_tracks([(curve.track.values, rated)])
    with opened("labelled") as it:
        assert it.page.locator("#valence .ccc").text_content() == f"CCC {valence:.3f}"
        assert it.page.locator("#arousal .ccc").text_content() == f"CCC {arousal:.3f}"
        assert it.page.locator("#legend-label").is_visible()
        assert it.page.locator("#legend-spread").is_visible()
        it.js("vacli.page.seek(2.001)")
        assert it.page.locator("#valence .label").text_content() == f"label {rated[50, 0]:.3f}"
        it.js("vacli.page.seek(1.001)")  # not labelled there
        assert it.page.locator("#valence .label").text_content() == "label none"
        assert it.page.locator("#truth").get_attribute("visibility") == "hidden"
    with opened("plain") as it:
        assert it.page.locator("#valence .ccc").text_content() == ""
        assert it.page.locator("#legend-label").is_hidden()


def test_the_dot_is_where_the_values_are(opened):
    with opened("plain") as it:
        it.js("vacli.page.seek(2.001)")
        valence, arousal = a_curve().track.values[50]
        assert it.page.locator("#dot").get_attribute("transform") == (
            f"translate({100 * valence:.1f},{-100 * arousal:.1f})"
        )
        tail = it.js(
            "[...document.querySelectorAll('#tail polyline')].map((e) => e.getAttribute('points')).join(' ')"
        )
        points = [tuple(map(float, p.split(","))) for p in tail.split()]
        assert points[-1] == pytest.approx((100 * valence, -100 * arousal), abs=0.06)
        first_v, first_a = a_curve().track.values[0]  # three seconds before is the beginning
        assert points[0] == pytest.approx((100 * first_v, -100 * first_a), abs=0.06)


def test_two_people_take_turns_on_one_page(opened):
    with opened("two") as it:
        it.js("vacli.page.seek(2.001)")
        value = lambda: it.page.locator("#valence .value").text_content()  # noqa: E731
        assert value() == f"{a_curve(phase=0).track.values[50, 0]:.3f}"
        it.page.get_by_role("radio", name="right").check(force=True)
        assert value() == f"{a_curve(phase=1).track.values[50, 0]:.3f}".replace("-", "\u2212")
        assert it.js("vacli.page.row") == 50  # the time is the same
        assert it.page.locator("[data-person='1']").is_visible()
        assert it.page.locator("[data-person='0']").is_hidden()
        assert it.page.locator(".uplot").count() == 2
    with opened("index") as it:
        it.page.locator("#videos tr", has_text="right").locator("a").click()
        assert it.page.get_by_role("radio", name="right").is_checked()


def test_at_a_variable_rate_the_curve_keeps_the_videos_time(opened):
    times_s = np.round(np.cumsum(np.tile([0.02, 0.06, 0.1], 30)), 3) - 0.02
    with opened("vfr") as it:
        it.video_is_ready()
        for row in (7, 40, 83):
            it.js(f"vacli.page.seek({times_s[row] + 0.005})")
            assert it.js("vacli.page.row") == row
            assert it.shade() == pytest.approx(40 + row, abs=2)


@pytest.mark.parametrize("name", ["lost", "unplayable"])
def test_without_its_video_a_curve_still_works(opened, name):
    with opened(name) as it:
        it.page.locator("#no-video").wait_for(state="visible")
        assert "The curves work without it" in it.page.locator("#no-video").text_content()
        assert it.page.locator("#play").is_disabled()
        it.at("valence", 2.0)
        assert it.js("vacli.page.now_s") == pytest.approx(2.0, abs=0.05)
        it.page.keyboard.press("Home")
        it.page.keyboard.press("Space")
        assert it.js("vacli.page.row") == 0
        assert it.said == []


@pytest.mark.parametrize("name", ["index", "labelled", "two", "unplayable", "script", "long"])
def test_at_phone_width_nothing_sticks_out(opened, name):
    with opened(name, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True) as it:
        assert it.js("document.documentElement.scrollWidth") == 360
        wide = it.js("""[...document.querySelectorAll('body *')]
            .filter((e) => !e.closest('.hidden-text, svg, .skip, .uplot'))
            .filter((e) => e.getBoundingClientRect().right > 361).map((e) => e.className || e.tagName)""")
        assert wide == []


def test_a_finger_seeks(opened):
    with opened("plain", viewport={"width": 360, "height": 740}, has_touch=True) as it:
        it.video_is_ready()
        it.page.locator("#valence .u-over").tap(position={"x": it.x_of(4.0), "y": 50})
        it.until("Math.abs(document.getElementById('video').currentTime - 4) < 0.1")


@pytest.mark.parametrize("name", ["index", "labelled", "two", "lost"])
def test_axe_finds_nothing_serious(opened, name):
    from axe_playwright_python.sync_playwright import Axe

    for width, scheme in ((1280, "light"), (360, "dark")):
        with opened(name, color_scheme=scheme, viewport={"width": width, "height": 800}) as it:
            for closed in it.page.locator("details:not([open]) summary").all():
                closed.click()
            found = Axe().run(it.page).response
            assert len(found["passes"]) > 10
            serious = [
                (v["id"], [node["target"] for node in v["nodes"]])
                for v in found["violations"]
                if v["impact"] in ("serious", "critical")
            ]
            assert serious == []


def test_pages_are_dark_or_light_as_the_reader_is(opened):
    with opened("labelled", color_scheme="dark") as it:
        ground = lambda: it.js("getComputedStyle(document.body).backgroundColor")  # noqa: E731
        line = lambda: it.js("vacli.page.curves.panels[0].plot.series[1].stroke()")  # noqa: E731
        dark = ground(), line()
        it.page.emulate_media(color_scheme="light")
        it.until(f"getComputedStyle(document.body).backgroundColor !== '{dark[0]}'")
        it.page.wait_for_timeout(50)
        assert ground() != dark[0]
        assert line() != dark[1]  # the drawing too


def test_nothing_moves_by_itself(opened):
    for name in ("index", "plain"):
        with opened(name, reduced_motion="reduce") as it:
            assert it.js("document.getAnimations().length") == 0


def test_the_index_is_sorted_by_the_keyboard_and_says_how(opened):
    with opened("index") as it:
        head = it.page.locator("th", has=it.page.get_by_role("button", name="Valence", exact=True))
        names = lambda: it.page.locator("#videos tbody th bdi").all_text_contents()  # noqa: E731
        keys = """[...document.querySelectorAll('#videos tbody tr')].map((r) => Number(r.cells[2].dataset.key))"""
        before = names()
        head.locator("button").focus()
        it.page.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") == "descending"
        assert it.js(keys) == sorted(it.js(keys), reverse=True)
        it.page.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") == "ascending"
        assert it.js(keys) == sorted(it.js(keys))
        it.page.get_by_role("button", name="Video", exact=True).click()
        assert names() == before
        assert it.page.locator("th[aria-sort]").count() == 1
        it.page.get_by_role("button", name="CCC valence").click()
        assert names()[0] == "labelled.mp4"  # those without a CCC come last


def test_the_index_is_searched(opened):
    with opened("index") as it:
        rows = it.page.locator("#videos tbody tr:visible")
        everything = rows.count()
        it.page.get_by_label("Search").fill("LABEL")
        assert rows.count() == 1
        assert it.page.locator("#found").text_content() == f"1 of {everything}"
        it.page.get_by_label("Search").fill("no such video")
        assert rows.count() == 0
        assert it.page.locator("#nothing").is_visible()
        it.page.get_by_label("Search").fill("")
        assert rows.count() == everything


def test_the_index_says_first_what_failed(opened):
    with opened("index") as it:
        failed = it.page.locator(".notice.bad")
        assert "failed.mp4: moov atom not found" in failed.text_content()
        assert failed.bounding_box()["y"] < it.page.locator("#videos").bounding_box()["y"]


def test_an_hour_is_drawn_of_few_points_and_told_exactly(opened):
    with opened("hour") as it:
        it.until("vacli.page.curves.drawn_ms > 0")
        points, width = it.js("""(() => { const { plot } = vacli.page.curves.panels[0];
            return [plot.data[0].length, plot.over.clientWidth]; })()""")
        assert points <= 2 * width + 4
        assert (
            it.js("Math.max(...vacli.page.curves.panels[0].plot.data[1])") == 1
        )  # the one odd frame is not lost
        it.js(f"vacli.page.seek({SPIKE_ROW / 30 + 0.001})")
        assert it.page.locator("#valence .value").text_content() == "1.000"
        assert it.page.locator("#frame").text_content() == str(SPIKE_ROW + 1)
        it.js("vacli.page.curves.show(2000, 2001)")
        assert (
            it.js("vacli.page.curves.panels[0].plot.data[0].length") < 40
        )  # near enough every frame is drawn
        drawn = it.js("""[0.5, 60, 900, 2500].map((span_s) => { const c = vacli.page.curves;
            c.show(1000, 1000 + span_s); return c.panels[0].plot.data[0].length; })""")
        assert drawn[0] < drawn[1]
        assert max(drawn) <= 2 * width + 4  # whatever is in view: what a redraw costs goes with this
