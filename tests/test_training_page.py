"""The training page: it says what the runs say, survives whatever lies in their folder, and works in a browser."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vacli import VacliError
from vacli.report.configuration import preset_toml
from vacli.report.runs import differences, find_runs
from vacli.report.training_page import write_training_page
from vacli.temporal.folds import train_folds
from vacli.temporal.predict import open_run
from vacli.temporal.preset import check_preset, load_preset
from vacli.temporal.sweep import sweep
from vacli.temporal.train import train

from .toy_store import TINY, make_store, tiny

HOSTILE = "<script>alert(1)<b> &amp; \U0001f600"
KEYS = ("valence", "arousal", "mean")
V, A, MEAN, HEAD, STREAMS, DIFFERS, PARAMETERS, SEED, EPOCHS, BEST, SMOOTHING, STATE = range(
    12
)  # behind the name


def silent(line: str) -> None:
    pass


class Stopped(Exception):
    pass


def stop_after_two(line: str) -> None:
    if line.startswith("epoch 2"):
        raise Stopped


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Finished runs of two heads, one stopped, folds, a sweep, a hostile name; a damaged run and no run at all."""
    store = make_store(tmp_path_factory.mktemp("training") / "features.zarr", train=4, validation=2)
    runs = store.path.parent / "runs"
    train(store, tiny("mamba", alone_epochs=1), runs=runs, name="whole", tell=silent)
    train(store, tiny("mamba", ["mae"], lr=0.002), runs=runs, name="face only", seed=7, tell=silent)
    train(store, tiny("linear"), runs=runs, name=HOSTILE, tell=silent)
    with pytest.raises(Stopped):
        train(store, tiny("mamba", epochs=9), runs=runs, name="stopped", tell=stop_after_two)
    train_folds(store, tiny("linear", epochs=2), folds=3, runs=runs, name="cross", tell=silent)
    quick = {k: v for k, v in TINY["linear"].items() if k != "windows.length"} | {"train.epochs": "1"}
    space = ["windows.length=40..60", "train.lr=1e-3..1e-1:log"]
    sweep(store, "linear", space, trials=2, changes=quick, runs=runs, name="search", tell=silent)
    (runs / "damaged").mkdir()
    (runs / "damaged" / "run.json").write_text('{"preset": ')
    (runs / "holiday").mkdir()
    (runs / "holiday" / "photo.txt").write_text("no run")
    return runs


@pytest.fixture(scope="module")
def page(runs) -> Path:
    return write_training_page(runs, silent)


def about(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


# ---- what is found -------------------------------------------------------------------------------------------


def test_every_run_is_found_and_whatever_is_none_is_named(runs):
    found = find_runs(runs)
    names = [HOSTILE, "face only", "search/trial-000", "search/trial-001", "stopped", "whole"]
    assert sorted(run.name for run in found.runs) == sorted(names)
    assert [(folds.name, sorted(folds.runs)) for folds in found.folds] == [("cross", [0, 1, 2])]
    assert found.problems.keys() == {"damaged", "holiday"}
    assert "cannot be read" in found.problems["damaged"]


def test_parameters_are_those_of_the_network(runs):
    for run in find_runs(runs).runs:
        net = open_run(runs / run.name).network() if run.finished else None
        if net is not None:
            assert run.parameters == sum(p.numel() for p in net.parameters())


def test_the_best_epoch_of_a_finished_run_is_that_of_its_weights(runs):
    for run in find_runs(runs).runs:
        lines = [json.loads(line) for line in (runs / run.name / "metrics.jsonl").read_text().splitlines()]
        judged = [line for line in lines if "ccc" in line]
        best = max(line["ccc"]["mean"] for line in judged)
        assert run.best is not None
        assert run.best.number == next(line["epoch"] for line in judged if line["ccc"]["mean"] == best)
        assert [epoch.loss for epoch in run.epochs] == [line["loss"] for line in lines]


def test_only_keys_that_differ_are_named(runs):
    found = find_runs(runs).runs
    among = differences(found, {})
    assert among["face only"] == {"train.alone_epochs": 0, "train.epochs": 3, "train.lr": 0.002}
    assert among["whole"] == {"train.alone_epochs": 1, "train.epochs": 3, "train.lr": 0.01}
    own = differences(found, {"linear": load_preset("linear").model_dump()})
    changed = {"windows.length": 50, "windows.stride": 40, "train.batch": 4, "train.epochs": 3}
    assert own[HOSTILE] == changed
    assert own["whole"] == among["whole"]  # of this head no preset was given


def test_the_shown_preset_is_toml_that_makes_the_same_run(runs):
    for run in find_runs(runs).runs:
        again = check_preset(tomllib.loads(preset_toml(run.preset)), "page")
        assert again.model_dump() == run.preset
    odd = {
        "name": "x",
        "encode": {'a "b".c': {"vgg": None, "blocks": [{"tcn": {"on": True, "p": 1e-7}}]}},
        "s": "\\\n\U0001f600",
    }
    assert tomllib.loads(preset_toml(odd)) == {
        "name": "x",
        "encode": {'a "b".c': {"blocks": [{"tcn": {"on": True, "p": 1e-7}}]}},
        "s": "\\\n\U0001f600",
    }


# ---- whatever lies there -------------------------------------------------------------------------------------

DEEP = '{"a":' * 900 + "1" + "}" * 900
GOOD = {"preset": {"name": "linear", "streams": ["mae"], "train": {"epochs": 3}}, "seed": 0}


@pytest.mark.parametrize(
    "record",
    [
        "[]",
        "null",
        '{"preset": 3}',
        '{"preset": {"name": ["x"]}}',
        "[" * 100_000,
        '{"preset": {"name": "x"}, "figures": {"valence": NaN, "arousal": 0, "mean": 0}}',
        '{"preset": {"name": "x"}, "seed": ' + "9" * 5000 + "}",
        "\xff\xfe",
        f'{{"preset": {{"name": "x", "z": {DEEP}}}}}',
        f'{{"preset": {{"name": "x"}}, "streams": {{"mae": {{"recipe": {DEEP}}}}}}}',
    ],
)
def test_a_record_that_is_none_stops_nothing(tmp_path, record):
    for name, said in (("bad", record), ("good", json.dumps(GOOD))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_bytes(said.encode("latin-1"))
    page = write_training_page(tmp_path, silent)
    found = find_runs(tmp_path)
    assert [run.name for run in found.runs] == ["good"]
    assert found.problems.keys() == {"bad"}
    assert "<b>bad</b>" in page.read_text()


@pytest.mark.parametrize(
    "shape", [[10**4000, 10**4000], [-5], ["9"], [2**62] * 17, [2**62] * 16 + [True], 7, None, [2.5]]
)
def test_weights_no_one_could_have_are_not_counted(tmp_path, shape):
    (tmp_path / "run.json").write_text(json.dumps(GOOD))
    header = json.dumps({"a": {"shape": shape}}).encode()
    (tmp_path / "weights.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    write_training_page(tmp_path, silent)
    (run,) = find_runs(tmp_path).runs
    assert run.parameters is None


def test_the_time_it_was_written_has_its_zone(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(GOOD))
    assert re.search(r"\d\d:\d\d:\d\d [+-]\d{4}", write_training_page(tmp_path, silent).read_text())


@pytest.mark.parametrize("odd", [None, 3, [], "x", {}, {"a": [None]}, float("inf"), True])
def test_odd_things_anywhere_in_a_run_are_shown_or_left_out(tmp_path, odd):
    keys = (
        "seed",
        "streams",
        "label",
        "started_from",
        "train",
        "validation",
        "versions",
        "device",
        "smoothing",
    )
    tree = {**GOOD, "preset": {"name": "x", "streams": odd, "train": odd, "encode": odd}} | dict.fromkeys(
        keys, odd
    )
    (tmp_path / "run.json").write_text(json.dumps(tree))
    lines = [odd, {"epoch": "1"}, {"epoch": 1, "loss": odd, "ccc": odd, "seconds": odd}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"epoch": 2, "lo'  # as it is being written
    (tmp_path / "metrics.jsonl").write_text(text)
    page = write_training_page(tmp_path, silent)
    (run,) = find_runs(tmp_path).runs
    assert ([epoch.number for epoch in run.epochs], run.unread) == ([1], 2)
    assert "2 lines of metrics.jsonl cannot be read" in page.read_text()


def test_folds_half_done_and_odd_are_shown(runs, tmp_path):
    shutil.copytree(runs / "cross", tmp_path / "cross")
    tree = json.loads((tmp_path / "cross" / "folds.json").read_text())
    del tree["figures"]
    (tmp_path / "cross" / "folds.json").write_text(json.dumps(tree | {"rows": "many", "preset": None}))
    shutil.rmtree(tmp_path / "cross" / "fold-1")
    (tmp_path / "cross" / "fold-2" / "run.json").write_text("{")
    page = write_training_page(tmp_path / "cross", silent)
    assert page == tmp_path / "cross" / "index.html"
    assert page.read_text().count("not trained yet") == 2
    assert "1 of 3 folds" in page.read_text()
    assert find_runs(tmp_path).problems.keys() == {"cross/fold-2"}


def test_a_link_is_not_followed_and_no_run_is_an_error(runs, tmp_path):
    (tmp_path / "away").symlink_to(runs)
    with pytest.raises(VacliError, match=r"no run in .*vacli train"):
        write_training_page(tmp_path, silent)
    with pytest.raises(VacliError, match="no folder"):
        write_training_page(tmp_path / "gone", silent)
    assert not (tmp_path / "index.html").exists()


def test_a_page_written_again_shows_what_was_trained_since(runs, tmp_path):
    shutil.copytree(runs / "stopped", tmp_path / "going")
    metrics = tmp_path / "going" / "metrics.jsonl"
    one, two = metrics.read_text().splitlines(keepends=True)
    told: list[str] = []
    for lines, count in ((one + two[:20], 1), (one + two, 2)):
        metrics.write_text(lines)
        page = write_training_page(tmp_path, told.append)
        assert f"not finished after epoch {count} of at most 9" in page.read_text()
        assert "cannot be read" not in page.read_text()
    assert told[-1].endswith("index.html: 1 not finished")


# ---- in a browser --------------------------------------------------------------------------------------------


@pytest.fixture
def opened(browser, page) -> Iterator[Any]:
    """The page in a tab; whatever it says to the console, or asks of the network, is a failure."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    tab.on("request", lambda request: said.append(request.url) if request.url != page.as_uri() else None)
    tab.goto(page.as_uri())
    yield tab
    tab.close()
    assert said == []


def rows_of(tab: Any, table: str = "runs") -> dict[str, list[str]]:
    """A table: what stands first in a row -> the other cells."""
    script = "rows => rows.map(r => [...r.cells].map(c => c.innerText.trim()))"
    return {name: cells for name, *cells in tab.eval_on_selector_all(f"table.{table} tbody tr", script)}


def head(tab: Any, name: str) -> Any:
    return tab.locator("table.runs thead button").filter(has_text=re.compile(f"^{name}$"))


def test_the_table_says_what_the_runs_say(opened, runs):
    rows = rows_of(opened)
    assert len(rows) == 7
    for name in (HOSTILE, "face only", "whole", "search/trial-000", "search/trial-001"):
        run, cells = about(runs / name), rows[name]
        assert cells[V : MEAN + 1] == [f"{run['figures'][key]:.4f}" for key in KEYS]
        assert cells[HEAD] == run["preset"]["name"]
        assert cells[STREAMS] == ", ".join(run["preset"]["streams"])
        assert cells[SEED] == str(run["seed"])
        assert cells[STATE] == "finished"
    assert rows["face only"][DIFFERS].split() == ["train.alone_epochs=0", "train.epochs=3", "train.lr=0.002"]
    assert rows["whole"][EPOCHS] == "3 of 3"
    stopped = [
        json.loads(line)["ccc"] for line in (runs / "stopped" / "metrics.jsonl").read_text().splitlines()
    ]
    best = max(stopped, key=lambda ccc: ccc["mean"])
    assert rows["stopped"][V : MEAN + 1] == [f"{best[key]:.4f} *" for key in KEYS]
    assert rows["stopped"][STATE] == "not finished"
    assert rows["stopped"][EPOCHS] == "2 of 9"


def test_the_folds_table_is_that_of_folds_json(opened, runs):
    figures = json.loads((runs / "cross" / "folds.json").read_text())["figures"]
    wanted = {
        **{f"{k}{' *' * (k == 0)}": about(runs / "cross" / f"fold-{k}")["figures"] for k in range(3)},
        "mean": figures["mean"],
        "std": figures["std"],
        "out of fold": figures["out_of_fold"],
    }
    shown = {name: cells[:3] for name, cells in rows_of(opened, "folds").items()}
    assert shown == {name: [f"{each[key]:.4f}" for key in KEYS] for name, each in wanted.items()}
    assert rows_of(opened)["cross, mean of 3 folds"][V : MEAN + 1] == shown["mean"]


def test_it_sorts_by_number_and_by_name_both_ways(opened):
    means = [float(cells[MEAN].rstrip(" *")) for cells in rows_of(opened).values()]
    assert means == sorted(means, reverse=True)  # the best first, from the start
    head(opened, "Mean").click()
    assert [float(cells[MEAN].rstrip(" *")) for cells in rows_of(opened).values()] == means[::-1]
    head(opened, "Parameters").press("Enter")
    counts = [int(cells[PARAMETERS].replace(",", "")) for cells in rows_of(opened).values()]
    assert counts == sorted(counts, reverse=True)
    head(opened, "Best epoch").click()
    head(opened, "Best epoch").click()
    assert next(reversed(rows_of(opened))) == "cross, mean of 3 folds"  # it has none
    head(opened, "Run").click()
    assert next(reversed(rows_of(opened))) == "whole"
    sorted_by = opened.evaluate(
        "[...document.querySelectorAll('[aria-sort]')].map(h => [h.innerText.trim(), h.ariaSort])"
    )
    assert sorted_by == [["Run", "ascending"]]


def test_every_run_has_its_charts_with_the_values_of_its_metrics(opened, runs):
    for holder in opened.query_selector_all(".chart"):
        holder.scroll_into_view_if_needed()
        opened.wait_for_function("holder => holder.querySelector('canvas')", arg=holder)
    assert opened.evaluate("document.querySelectorAll('.chart canvas').length") == 2 * (6 + 3)
    card = opened.locator("section", has=opened.get_by_role("heading", name="whole", exact=True))
    first = json.loads(
        (runs / "whole" / "metrics.jsonl").read_text().splitlines()[1]
    )  # behind the stage alone
    over = card.locator("[data-kind=ccc] .u-over")
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    opened.mouse.move(box["x"] + box["width"] / 3, box["y"] + 20)  # epoch 2 of 1 to 4
    shown = {key: card.locator(f"[data-series={key}] .value").inner_text() for key in (*KEYS, "loss")}
    assert shown == {**{key: f"{first['ccc'][key]:.4f}" for key in KEYS}, "loss": f"{first['loss']:.4f}"}
    lit = "c => new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer).some(p => p)"
    assert card.locator("[data-kind=loss] canvas").evaluate(lit)


def test_hostile_names_are_text(opened):
    assert HOSTILE in rows_of(opened)
    assert (
        opened.evaluate("document.querySelectorAll('main b, main script').length") == 2
    )  # those of the notice
    opened.get_by_text("2 folders left out").click()
    assert opened.get_by_text("cannot be read").is_visible()


def test_the_configuration_is_there_to_be_unfolded(opened, runs):
    card = opened.locator("section", has=opened.get_by_role("heading", name="face only", exact=True))
    card.get_by_text("Configuration").click()
    said, run = card.inner_text(), about(runs / "face only")
    for wanted in (
        run["streams"]["mae"]["folder"],
        run["settings"],
        run["versions"]["torch"],
        '"made_by": "toy"',
    ):
        assert wanted in said
    assert "lr = 0.002" in said
    assert "Trained on 4 videos" in said
    assert "vacli encoders" in said


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser, page, scheme):
    pytest.importorskip("axe_playwright_python")
    from axe_playwright_python.sync_playwright import Axe

    tab = browser.new_page(color_scheme=scheme, bypass_csp=True)
    tab.goto(page.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    found = Axe().run(tab).response["violations"]
    tab.close()
    serious = [v for v in found if v["impact"] in ("serious", "critical")]
    assert [(v["id"], v["nodes"][0]["html"][:200]) for v in serious] == []


def test_a_phone_scrolls_tables_and_not_the_page(browser, page):
    tab = browser.new_page(viewport={"width": 360, "height": 780})
    tab.goto(page.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    assert tab.evaluate("(e => e.scrollWidth > e.clientWidth)(document.querySelector('.scroll'))")
    tab.close()
