"""The page of an audit in a real browser: search, filters, keys, marks that stay, are saved and loaded again."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from audits import DIGEST, audited
from browsers import NARROW, opened, wider_by

from gapo.runs.audit.marks import read_marks
from gapo.runs.audit.page import write_page

HOSTILE = "</script><script>document.title='run'</script><img src=x onerror=\"document.title='run'\">' \" & \u202eabc"
Open = Callable[..., AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 40 of 60 pairs, with hostile text; tests only read it."""
    result = audited(60, flips=True, source=f"{HOSTILE}.jsonl")
    result.rows[0] |= {"id": HOSTILE, "chosen": HOSTILE, "rejected": "w" * 3000, "mark": "unsure"}
    result.rows[1] |= {"prompt": [{"role": HOSTILE, "content": HOSTILE}, {"role": "user", "content": "Straße, Éclair"}]}
    result.rows[2] |= {"rejected": "line\n" * 100}
    path = tmp_path_factory.mktemp("page") / "audit.html"
    write_page(path, result, most=40)
    return path


@pytest.fixture(scope="module")
def numbers(path: Path) -> list[int]:
    """The row of each pair on the page, in order."""
    return [row["row"] for row in audited(60).rows[:40]]


def shown(page: Any) -> list[int]:
    rows: list[int] = page.evaluate("[...document.querySelectorAll('.pair:not([hidden])')].map((x) => +x.dataset.row)")
    return rows


def current(page: Any) -> int:
    row: int = page.evaluate("+document.querySelector('[aria-current]').dataset.row")
    return row


def press(page: Any, keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def saved(page: Any, folder: Path) -> Path:
    with page.expect_download() as download:
        page.get_by_role("button", name="Save marks.json").click()
    assert download.value.suggested_filename == "marks.json"
    download.value.save_as(folder / "marks.json")
    return folder / "marks.json"


def test_search_and_filters(browser: Any, path: Path, numbers: list[int]) -> None:
    with opened(browser, path) as page:
        assert shown(page) == numbers
        for role, name in (
            ("searchbox", "Search"),
            ("spinbutton", "Probability"),
            ("combobox", "Mark"),
            ("combobox", "Flipped"),
        ):
            assert page.get_by_role(role, name=name).count() == 1
        page.locator("#search").fill("strasse")
        assert shown(page) == []
        page.locator("#search").fill("STRAẞE, e\u0301clair")  # another case, and an accent of two characters
        assert shown(page) == numbers[1:2]
        page.locator("#search").fill("")
        page.locator("#least").fill("50")
        likely = [row["row"] for row in audited(60).rows[:40] if row["p_wrong"] >= 0.5]
        assert 0 < len(likely) < 40
        assert shown(page) == likely
        assert page.locator("#count").inner_text().startswith(f"{len(likely)} of 40 pairs shown; 1 marked")
        page.locator("#least").fill("0")
        page.locator("#by-flip").select_option("no")
        assert shown(page) == numbers[12:]
        page.locator("#by-flip").select_option("")
        for choice, rows in (("unsure", numbers[:1]), ("any", numbers[:1]), ("none", numbers[1:]), ("wrong", [])):
            page.locator("#by-mark").select_option(choice)
            assert shown(page) == rows


def test_keys_move_and_mark(browser: Any, path: Path, numbers: list[int]) -> None:
    with opened(browser, path) as page:
        press(page, "w")
        assert page.locator("#said").inner_text() == "No pair is chosen: press j, or click one."
        press(page, "jjj")
        assert current(page) == numbers[2]
        assert page.locator(":focus").get_attribute("data-row") == str(numbers[2])
        card, bar = (page.locator(name).bounding_box() for name in (":focus", "#bar"))
        assert card["y"] >= bar["y"] + bar["height"] - 1  # not behind the bar, which stays in sight
        press(page, "kkk")
        assert current(page) == numbers[0]  # and stays there
        press(page, "jwru")  # each mark goes on to the next
        assert current(page) == numbers[4]
        marks = page.locator(".pair .marked").all_inner_texts()
        assert marks[:5] == ["unsure", "wrong", "right", "unsure", ""]
        assert page.locator("#said").inner_text().endswith(": unsure.")
        assert page.locator("#count").inner_text().endswith("4 marked: 1 wrong, 1 right, 2 unsure.")
        page.get_by_label("a key's mark goes on to the next").uncheck()
        press(page, "kww")  # the same mark again takes it back
        assert page.locator(".pair .marked").all_inner_texts()[3] == ""
        page.locator("#search").fill("jwk")  # letters of a text are no keys
        assert page.locator("#search").input_value() == "jwk"
        page.locator("#search").fill("")
        page.keyboard.press("Escape")
        press(page, "/")
        assert page.evaluate("document.activeElement.id") == "search"
        page.keyboard.press("Escape")
        page.get_by_label("Keys:").uncheck()
        press(page, "wjj")
        assert current(page) == numbers[3]
        assert page.locator("#count").inner_text().endswith("3 marked: 1 wrong, 1 right, 1 unsure.")


def test_keys_pass_what_is_filtered_out(browser: Any, path: Path, numbers: list[int]) -> None:
    with opened(browser, path) as page:
        page.locator("#by-mark").select_option("none")
        press(page, "j")
        assert current(page) == numbers[1]
        press(page, "ww")
        assert current(page) == numbers[3]
        page.locator("#by-mark").select_option("wrong")
        assert shown(page) == numbers[1:3]
        page.locator("h1").click()
        press(page, "r")  # the current one is hidden now, and is not marked unseen
        assert page.locator("#said").inner_text() == "No pair is chosen: press j, or click one."
        assert page.locator("#count").inner_text().endswith("3 marked: 2 wrong, 0 right, 1 unsure.")
        press(page, "k")
        assert current(page) == numbers[2]


def test_marks_stay_are_saved_and_loaded(browser: Any, path: Path, numbers: list[int], tmp_path: Path) -> None:
    with opened(browser, path) as page:
        cards = page.locator(".pair")
        for place, mark in ((0, "unsure"), (3, "wrong"), (4, "right")):  # the first one came with this mark: taken back
            cards.nth(place).get_by_role("button", name=mark).click()
        assert cards.nth(3).get_by_role("button", name="wrong").get_attribute("aria-pressed") == "true"
        page.reload()
        assert cards.nth(3).get_by_role("button", name="wrong").get_attribute("aria-pressed") == "true"
        assert page.locator(".pair .marked").all_inner_texts()[:5] == ["", "", "", "wrong", "right"]
        file = saved(page, tmp_path)
        marks = {numbers[3]: "wrong", numbers[4]: "right"}
        assert read_marks(file, DIGEST, pairs=60) == marks
        entry = next(x for x in json.loads(file.read_text())["marks"] if x["row"] == numbers[3])
        assert entry == {"row": numbers[3], "line": numbers[3] + 1, "id": audited(60).rows[3]["id"], "mark": "wrong"}
    with opened(browser, path) as page:  # a new profile, which keeps nothing
        assert page.locator(".pair .marked").all_inner_texts()[:5] == ["unsure", "", "", "", ""]
        away = next(row["row"] for row in audited(60).rows[40:])  # of a pair that is not on the page
        content = json.loads(file.read_text())
        content["marks"].append({"row": away, "line": None, "id": None, "mark": "wrong"})
        file.write_text(json.dumps(content))
        (tmp_path / "one.json").write_text(json.dumps({**content, "marks": content["marks"][:1]}))
        page.locator("#load").set_input_files(file)
        page.locator("#said", has_text="3 marks loaded from marks.json.").wait_for()
        page.locator("#load").set_input_files(tmp_path / "one.json")
        page.locator("#said", has_text="1 mark loaded from one.json.").wait_for()
        assert read_marks(saved(page, tmp_path), DIGEST) == {**marks, away: "wrong", numbers[0]: "unsure"}
        page.once("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name="Forget all marks").click()
        page.reload()
        assert page.locator("#count").inner_text().endswith("0 marked: 0 wrong, 0 right, 0 unsure.")
        assert page.get_by_role("button", name="Save marks.json").is_disabled()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"format": "other"}, "it is no marks.json of an audit's page."),
    ({"version": 2}, "it is of version 2, and this page reads 1."),
    ({"pairs_digest": "0" * 64}, "it marks other pairs than this page's."),
    ({"marks": [{"row": 60, "mark": "wrong"}]}, 'it has an entry that is no mark: {"row":60,"mark":"wrong"}.'),
    ({"marks": [{"row": 1, "mark": "bad"}]}, 'it has an entry that is no mark: {"row":1,"mark":"bad"}.'),
]


def test_files_of_other_marks_are_refused(browser: Any, path: Path, tmp_path: Path) -> None:
    content = {"format": "gapo-marks", "version": 1, "pairs_digest": DIGEST, "marks": [{"row": 1, "mark": "wrong"}]}
    with opened(browser, path) as page:
        alert = page.get_by_role("alert")
        for number, (change, message) in enumerate(REFUSED):
            file = tmp_path / f"{number}.json"
            file.write_text(json.dumps(content | change))
            page.locator("#load").set_input_files(file)
            alert.filter(has_text=file.name).wait_for()
            assert alert.inner_text() == f"{file.name} was not loaded: {message}"
        assert "1 marked" in page.locator("#count").inner_text()


def test_a_browser_that_keeps_nothing_says_so(browser: Any, path: Path) -> None:
    with opened(browser, path) as page:
        page.add_init_script("Object.defineProperty(window, 'localStorage', {get() { throw new Error('off') }})")
        page.reload()
        press(page, "jjw")
        assert (
            page.get_by_role("alert").inner_text()
            == "This browser keeps no marks: save them as a file before you leave."
        )
        assert "2 marked" in page.locator("#count").inner_text()


def test_two_windows_agree(browser: Any, path: Path) -> None:
    with opened(browser, path) as page:
        other = page.context.new_page()
        other.goto(path.as_uri())
        press(page, "jjw")
        other.locator(".pair").nth(1).locator(".marked", has_text="wrong").wait_for()


def test_text_of_users_stays_text(browser: Any, path: Path) -> None:
    with opened(browser, path) as page:
        assert page.title() != "run"
        text = page.locator(".pair").first.locator(".text").nth(1).inner_text()
        assert text == HOSTILE.replace("\u202e", "⟨U+202E⟩")
        roles = page.locator(".pair").nth(1).locator(".role")
        roles.nth(1).wait_for()
        assert roles.all_inner_texts() == [text, "user"]
        assert page.locator("script, img").count() == 1  # its own


def test_no_script_but_the_page_s_own_runs(browser: Any, path: Path, tmp_path: Path) -> None:
    """Even one that were written unescaped: the content security policy knows the digest of the page's own."""
    evil = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">"
    (tmp_path / "evil.html").write_text(path.read_text("utf-8").replace("<section>", f"<section>{evil}"), "utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "evil.html").as_uri())
    assert page.locator("section > script").count() == 1
    assert page.title() != "run"
    assert page.locator("#count").inner_text().startswith("40 of 40 pairs shown")
    page.close()


def test_it_fits_a_telephone_and_follows_the_theme(browser: Any, path: Path) -> None:
    with opened(browser, path, width=NARROW, color_scheme="light") as page:
        assert wider_by(page) == 0
        texts = page.locator(".pair").nth(0).locator(".text")  # none of which scrolls sideways
        assert texts.evaluate_all("all => all.every((x) => x.scrollWidth <= x.clientWidth)")
        long = page.locator(".pair").nth(2)
        assert long.locator(".text").last.evaluate("x => x.scrollHeight > x.clientHeight")
        press(page, "jjjx")
        assert long.locator(".text").last.evaluate("x => x.scrollHeight <= x.clientHeight")
        assert wider_by(page) == 0
        paper = []
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            paper.append(page.locator("body").evaluate("x => getComputedStyle(x).backgroundColor"))
        assert paper == ["rgb(252, 252, 251)", "rgb(20, 24, 29)"]
