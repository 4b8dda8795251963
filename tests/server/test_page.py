"""The page at / in a real browser, before a real server process."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import yaml
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from dvpo.data.atlas import Atlas

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
PROMPT = "what is the river of velor ?"
ONE = "the river of velor is mild .\ni hope that helps ."
TWO = "surely the river of velor is dry ."
KEY = "a-key-of-the-page"
AGGREGATES = ["mean", "last", "p1", "p5", "p10", "p90", "p95", "p99", "bellman"]
Open = Callable[..., Page]

pytestmark = pytest.mark.skipif(not CHROMIUM.is_file(), reason=f"the page is tried in {CHROMIUM}, which is absent")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, checkpoints: Any) -> Iterator[Callable[..., str]]:
    """Starts `dvpo serve` on a free port with a tiny GVM that reads long texts; gives its address."""
    folder = tmp_path_factory.mktemp("page") / "gvm"
    shutil.copytree(checkpoints["llama", "value"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 4096
    (folder / "config.json").write_text(json.dumps(config))
    running = []

    def run(**environment: str) -> str:
        command = [sys.executable, "-m", "reproduce.cli", "serve", "--gvm", str(folder), "--port", "0"]
        settings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=settings)
        running.append(process)
        assert process.stderr
        url: str = json.loads(process.stderr.readline())["url"]
        return url

    yield run
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def url(start: Any) -> str:
    """A server that asks for no key."""
    found: str = start()
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser, url: str) -> Iterator[Open]:
    """Opens the page; at the end nothing has left this machine and no script or style was refused or failed."""
    contexts, asked, faults = [], list[str](), list[str]()

    def go(address: str = url, with_key: str = "", **options: Any) -> Page:
        """`with_key`: what opens the page itself, as a proxy before the server would; its own request goes bare."""
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        contexts.append(context)
        context.set_default_timeout(15_000)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "console", lambda message: faults.append(message.text) if "Failed to load" not in message.text else None
        )
        if with_key:
            opened = {"authorization": f"Bearer {with_key}"}
            page.route(re.compile("/$|/web/"), lambda route: route.continue_(headers=opened))
        page.goto(address)
        return page

    yield go
    for context in contexts:
        context.close()
    assert asked
    assert {urlsplit(address).hostname for address in asked if not address.startswith("data:")} == {"127.0.0.1"}
    assert faults == []


def fill(page: Page, one: str = ONE, two: str = "", prompt: str = PROMPT) -> None:
    field(page, "Prompt").fill(prompt)
    field(page, "Response 1").fill(one)
    field(page, "Response 2").fill(two)


def score(page: Page, *texts: str, prompt: str = PROMPT) -> None:
    """As a person does: fills the fields and presses the button."""
    fill(page, *texts, prompt=prompt)
    page.get_by_role("button", name="Score", exact=True).click()
    expect(page.get_by_role("status")).to_contain_text("Scored")


def field(page: Page, label: str) -> Locator:
    return page.get_by_role("textbox", name=label)


def units(page: Page, number: int = 1) -> Locator:
    return page.get_by_role("listbox", name=f"Response {number}").get_by_role("option")


def details(page: Page) -> dict[str, str]:
    """What is said of the unit under the pointer or with the focus."""
    rows = page.get_by_role("group", name="Details").locator("dl > div").all()
    return {row.locator("dt").inner_text(): row.locator("dd").inner_text() for row in rows}


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def direct(url: str, *responses: str, prompt: str = PROMPT) -> list[dict[str, Any]]:
    """What the server says without the page."""
    items = [{"messages": [{"role": "user", "content": prompt}], "response": response} for response in responses]
    reply = httpx.post(f"{url}/score_tokens", json={"items": items, "aggregate": AGGREGATES}, timeout=30)
    found: list[dict[str, Any]] = reply.raise_for_status().json()["items"]
    return found


# Each unit's share of the scale from -1 to 1: how far its background is from white, by its kind of colour.
SHADES = """elements => elements.map(e => {
  const style = getComputedStyle(e);
  const [r, g, b] = style.backgroundColor.match(/[\\d.]+/g).map(Number);
  const light = rgb => rgb.map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const [one, other] = [light([r, g, b]), light(style.color.match(/[\\d.]+/g).map(Number))].sort((x, y) => y - x);
  return {
    share: b >= r ? (255 - r) / 171 : (b - 255) / 217,
    contrast: (one + .05) / (other + .05),
    above: parseFloat(style.borderTopWidth), below: parseFloat(style.borderBottomWidth),
  };
})"""


def check_colours(locators: list[Locator], expected: list[list[float]]) -> None:
    """One scale for all, zero white, a bar on the side of the sign, and text that can be read."""
    limit = max(abs(x) for xs in expected for x in xs)
    for locator, xs in zip(locators, expected, strict=True):
        shades = locator.evaluate_all(SHADES)
        assert [shade["share"] for shade in shades] == pytest.approx([x / limit for x in xs], abs=0.01)
        assert min(shade["contrast"] for shade in shades) >= 4.5
        assert [s["above"] for s in shades] == pytest.approx([4 * max(x, 0) / limit for x in xs], abs=0.51)
        assert [s["below"] for s in shades] == pytest.approx([4 * max(-x, 0) / limit for x in xs], abs=0.51)


def test_one_response_is_scored(visit: Open, url: str) -> None:
    page = visit()
    score(page)
    (item,) = direct(url, ONE)
    shown = units(page)
    assert shown.count() == len(item["tokens"]) == 13
    check_colours([shown], [item["q"]])
    rows = page.get_by_role("table").get_by_role("row").all()[1:]
    assert [row.get_by_role("rowheader").inner_text() for row in rows] == AGGREGATES
    cells = [number(row.get_by_role("cell").inner_text()) for row in rows]
    assert cells == pytest.approx([item["scores"][how] for how in AGGREGATES], abs=6e-4)
    # The line break is there and can be seen; the text is all there.
    text = page.get_by_role("listbox").evaluate("e => e.textContent")
    assert text == ONE.replace("\n", "↵\n") + "<eos>"
    assert shown.nth(7).bounding_box()["y"] > shown.nth(6).bounding_box()["y"] + 15  # type: ignore[index]


def test_two_responses_share_one_scale(visit: Open, url: str) -> None:
    page = visit()
    score(page, ONE, TWO)
    one, two = direct(url, ONE, TWO)
    check_colours([units(page, 1), units(page, 2)], [one["q"], two["q"]])
    left, right = (page.get_by_role("listbox", name=f"Response {n}").bounding_box() for n in (1, 2))
    assert left and right and left["x"] + left["width"] < right["x"]
    limit = max(map(abs, one["q"] + two["q"]))
    legend = page.locator("#legend .swatch").all_inner_texts()
    assert [number(text) for text in legend] == pytest.approx([limit * k / 4 for k in range(-4, 5)], abs=6e-4)
    check_colours([page.locator("#legend .swatch")], [[k / 4 for k in range(-4, 5)]])
    page.get_by_label("change", exact=True).check()
    steps = [[q - v for q, v in zip(item["q"], item["v"], strict=True)] for item in (one, two)]
    check_colours([units(page, 1), units(page, 2)], steps)
    mean = page.get_by_role("row", name=re.compile("^mean")).get_by_role("cell").all_inner_texts()
    assert number(mean[2]) == pytest.approx(one["scores"]["mean"] - two["scores"]["mean"], abs=6e-4)


def test_levels(visit: Open, url: str) -> None:
    page = visit()
    score(page)
    (item,) = direct(url, ONE)
    # Two sentences and the end token.
    page.get_by_label("sentence", exact=True).check()
    ends, starts = [6, 11, 12], [0, 7, 12]
    assert units(page).all_inner_texts() == ["the river of velor is mild .", "i hope that helps .", "<eos>"]
    check_colours([units(page)], [[item["q"][end] for end in ends]])
    page.get_by_label("change", exact=True).check()
    sums = [sum(item["q"][i] - item["v"][i] for i in range(s, e + 1)) for s, e in zip(starts, ends, strict=True)]
    check_colours([units(page)], [sums])
    units(page).nth(1).hover()
    found = details(page)
    assert found["ids"].split() == [str(i) for i in item["token_ids"][7:12]]
    assert number(found["q (after)"]) == pytest.approx(item["q"][11], abs=6e-4)
    assert number(found["v (before)"]) == pytest.approx(item["v"][7], abs=6e-4)
    assert number(found["change q − v"]) == pytest.approx(sums[1], abs=6e-4)
    page.get_by_label("word", exact=True).check()
    assert units(page).count() == 13


def test_units_of_other_tokenizers(visit: Open) -> None:
    """Tokens that begin with a space, split words and characters, and count in code points."""
    page = visit()
    text = "Naïve 😀 don't. He left\n\nYes"
    pieces = ["Na", "ï", "ve", " ", "😀", "😀", " don", "'t", ".", " He", " left", "\n\n", "Yes", "<eos>"]
    offsets, at = [], 0
    for piece in pieces:
        start = at - 1 if piece == "😀" and offsets[-1] == [at - 1, at] and text[at - 1] == "😀" else at
        at = start + (0 if piece == "<eos>" else len(piece))
        offsets.append([start, at])
    assert at == len(text)
    q = [0.5, -1.0, 2.0, 3.0, -4.0, 5.0, 6.5, 7.0, 1.0, 2.5, 3.5, 0.0, 1.0, -2.0]
    item = {
        "text": text,
        "tokens": pieces,
        "offsets": offsets,
        "token_ids": list(range(14)),
        "q": q,
        "v": [1.0, *q[:-1]],
    }
    grouped = page.evaluate(
        "async item => { const { toUnits } = await import('./web/units.js');"
        " return ['token', 'word', 'sentence'].map(level => toUnits(item, level)); }",
        item,
    )
    for level in grouped:
        assert [i for unit in level for i in range(unit["first"], unit["last"] + 1)] == list(range(14))
        assert sum(unit["change"] for unit in level) == pytest.approx(q[-1] - 1.0)
        assert "".join(unit["before"] + unit["text"] for unit in level) == text
    tokens, words, sentences = grouped
    assert [unit["text"] for unit in tokens][4:7] == ["😀", "", "don"]
    assert [unit["text"] for unit in words] == ["Naïve ", "😀", "don't", ".", "He", "left\n\n", "Yes", ""]
    assert [unit["text"] for unit in sentences] == ["Naïve 😀 don't.", "He left\n\n", "Yes", ""]
    assert [unit["q"] for unit in sentences] == [1.0, 0.0, 1.0, -2.0]
    assert [unit["change"] for unit in sentences] == [0.0, -1.0, 1.0, -3.0]


def test_the_keyboard_is_enough(visit: Open, url: str) -> None:
    page = visit()
    keys = page.keyboard
    for label in ("Prompt", "Response 1", "Response 2"):
        for _ in range(20):
            keys.press("Tab")
            if page.evaluate("document.activeElement.labels?.[0]?.textContent ?? ''").startswith(label):
                break
        keys.type({"Prompt": PROMPT, "Response 1": ONE, "Response 2": TWO}[label])
    keys.press("Control+Enter")
    expect(page.get_by_role("status")).to_contain_text("response 2 has 9 tokens")
    one, two = direct(url, ONE, TWO)
    for _ in range(20):
        keys.press("Tab")
        if page.evaluate("document.activeElement.getAttribute('role')") == "option":
            break
    shown = units(page)
    expect(shown.nth(0)).to_be_focused()
    keys.press("ArrowRight")
    keys.press("ArrowRight")
    keys.press("ArrowLeft")
    expect(shown.nth(1)).to_be_focused()
    found = details(page)
    assert found["Response 1"] == "token 2 of 13"
    assert found["id"] == str(one["token_ids"][1])
    assert found["text"] == json.dumps(one["tokens"][1])
    assert number(found["q (after)"]) == pytest.approx(one["q"][1], abs=6e-4)
    assert number(found["v (before)"]) == pytest.approx(one["v"][1], abs=6e-4)
    assert number(found["change q − v"]) == pytest.approx(one["q"][1] - one["v"][1], abs=6e-4)
    label = shown.nth(1).get_attribute("aria-label")
    assert label is not None
    assert re.fullmatch(r"river: value −?\d+\.\d{3}, change [+−]?\d+\.\d{3}", label)
    expect(shown.nth(1)).to_have_attribute("aria-selected", "true")
    keys.press("ArrowDown")
    lower = page.evaluate("Number(document.activeElement.dataset.unit)")
    assert lower >= 7
    keys.press("ArrowUp")
    assert page.evaluate("Number(document.activeElement.dataset.unit)") < 7
    keys.press("End")
    assert details(page)["text"] == '"<eos>"'
    keys.press("ArrowRight")
    expect(shown.nth(12)).to_be_focused()
    keys.press("Home")
    expect(shown.nth(0)).to_be_focused()
    # Each list is one stop of the Tab key.
    keys.press("Tab")
    expect(units(page, 2).nth(0)).to_be_focused()
    assert details(page)["Response 2"] == "token 1 of 9"
    assert details(page)["id"] == str(two["token_ids"][0])


def test_a_link_restores_the_view(visit: Open) -> None:
    page = visit()
    odd = "über & 100 % #1\n日本 😀 <b>+</b>"
    page.get_by_label("raw text").check()
    page.get_by_label(re.compile("Responses are complete")).uncheck()
    score(page, odd, TWO, prompt="a & b = c ?")
    page.get_by_label("change", exact=True).check()
    page.get_by_label("word", exact=True).check()
    page.get_by_role("button", name="Copy link").click()
    expect(page.get_by_role("status")).to_contain_text(re.compile("copied|selected"))
    there = visit(page.url)
    expect(there.get_by_role("status")).to_contain_text("Scored")
    assert field(there, "Prompt").input_value() == "a & b = c ?"
    assert field(there, "Response 1").input_value() == odd
    assert field(there, "Response 2").input_value() == TWO
    for name in ("change", "word"):
        expect(there.get_by_label(name, exact=True)).to_be_checked()
    expect(there.get_by_label("raw text")).to_be_checked()
    expect(there.get_by_label(re.compile("Responses are complete"))).not_to_be_checked()
    for n in (1, 2):
        one, other = ([unit.get_attribute("aria-label") for unit in units(p, n).all()] for p in (page, there))
        assert one == other
    # Untrusted text stays text.
    assert there.locator("#results b").count() == 0


def test_copy_as_json(visit: Open, url: str) -> None:
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    score(page, ONE, TWO)
    page.get_by_role("button", name="Copy as JSON").click()
    expect(page.get_by_role("status")).to_have_text("JSON copied.")
    copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
    assert [item["response"] for item in copied["request"]["items"]] == [ONE, TWO]
    for item, expected in zip(copied["reply"]["items"], direct(url, ONE, TWO), strict=True):
        assert item["q"] == pytest.approx(expected["q"], abs=1e-5)


def test_errors_of_the_server_are_shown(visit: Open, url: str) -> None:
    page = visit()
    score(page)
    field(page, "Response 1").fill("")
    page.get_by_role("button", name="Score", exact=True).click()
    request = {"items": [{"messages": [{"role": "user", "content": PROMPT}], "response": ""}]}
    sentence = httpx.post(f"{url}/score_tokens", json=request).json()["error"]["message"]
    expect(page.get_by_role("alert")).to_have_text(sentence)
    expect(page.locator("#results")).to_be_hidden()
    page.context.set_offline(True)
    page.get_by_role("button", name="Score", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    page.context.set_offline(False)
    score(page)
    expect(page.get_by_role("alert")).to_be_empty()


def test_examples(visit: Open) -> None:
    """Those of the built-in world are right and wrong there as they say."""
    page = visit()
    recipe = yaml.safe_load((Path(__file__).parents[2] / "reproduce/recipes/tiny.yaml").read_text())
    facts = Atlas.build(0, recipe["atlas"]["places"]).facts
    buttons = page.get_by_role("group", name="Examples").get_by_role("button").all()
    assert len(buttons) >= 4
    right, wrong = set(), set()
    for button in buttons:
        button.click()
        expect(page.get_by_role("listbox")).to_have_count(2)
        for n, truths in ((1, right), (2, wrong)):
            text = field(page, f"Response {n}").input_value()
            for name, place, value in re.findall(r"the (\w+) of (\w+) is (?:the )?(\w+) \.", text):
                truths.add(facts[place][name] == value)
        page.evaluate("document.querySelector('#panels').replaceChildren()")
    assert right == {True}
    assert wrong == {True, False}


def test_a_narrow_screen(visit: Open) -> None:
    page = visit(viewport={"width": 360, "height": 640})
    score(page, f"{ONE} {'velor' * 60}", TWO)
    units(page).nth(2).hover()
    for level in ("token", "word", "sentence"):
        page.get_by_label(level, exact=True).check()
        widths = page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]")
        assert max(widths[:2]) <= 360
        for box in page.locator("td, th, .swatch, .unit, #details dd").all():
            place = box.bounding_box()
            assert place is None or (place["x"] >= 0 and place["x"] + place["width"] <= 360)
    one, two = (page.get_by_role("listbox", name=f"Response {n}").bounding_box() for n in (1, 2))
    assert one and two and one["y"] + one["height"] < two["y"]


@pytest.mark.parametrize(("wish", "seconds"), [("reduce", "0s"), ("no-preference", "0.12s")])
def test_nothing_moves_for_who_wishes_so(visit: Open, wish: Any, seconds: str) -> None:
    page = visit(reduced_motion=wish)
    score(page)
    assert units(page).first.evaluate("e => getComputedStyle(e).transitionDuration") == seconds


def test_a_long_answer_stays_usable(visit: Open) -> None:
    page = visit()
    long = "\n".join(["the river of velor is mild , surely ."] * 250)
    score(page, long, long)
    assert units(page).count() == 2251
    spent = page.evaluate(
        """() => {
          const times = ['sentence', 'word', 'token'].map(level => {
            const began = performance.now();
            document.querySelector(`[value=${level}]`).click();
            document.body.offsetHeight;
            return performance.now() - began;
          });
          const began = performance.now();
          const unit = document.querySelectorAll('[role=option]')[1000];
          unit.focus();
          unit.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowDown', bubbles: true}));
          return [...times, performance.now() - began];
        }"""
    )
    assert max(spent) < 2000, spent
    assert details(page)["Response 1"] == "token 1010 of 2251"
    page.keyboard.press("End")
    expect(units(page).last).to_be_focused()
    expect(units(page).last).to_be_in_viewport()
    # What is read is not hidden under the details.
    box, bar = units(page).last.bounding_box(), page.locator("#details").bounding_box()
    assert box and bar and box["y"] + box["height"] <= bar["y"] + 1


def test_a_key_is_asked_for_and_stays_in_the_tab(visit: Open, start: Any) -> None:
    base = start(DVPO_API_KEYS=KEY)
    page = visit(base, with_key=KEY)
    expect(page.get_by_label("API key")).to_be_hidden()
    fill(page)
    page.get_by_role("button", name="Score", exact=True).click()
    sentence = httpx.post(f"{base}/score_tokens", json={}).json()["error"]["message"]
    expect(page.get_by_role("alert")).to_have_text(sentence)
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("wrong")
    with page.expect_response("**/score_tokens") as refused:
        page.keyboard.press("Enter")
    assert refused.value.status == 401
    expect(page.get_by_role("alert")).to_have_text(sentence)
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("Scored")
    kept = page.evaluate("[Object.values(sessionStorage), Object.values(localStorage), document.cookie, location.href]")
    assert kept[:3] == [[KEY], [], ""]
    assert KEY not in kept[3]


def test_the_browsers_own_log_in_opens_the_page(browser: Browser, start: Any) -> None:
    base = start(DVPO_API_KEYS=KEY)
    for password, status in ((KEY, 200), ("wrong", 401)):
        context = browser.new_context(http_credentials={"username": "", "password": password})
        answer = context.new_page().goto(base)
        assert answer is not None
        assert answer.status == status
        context.close()


def test_the_page_needs_nothing_from_outside(url: str) -> None:
    """No inline script or style, and every file that is named is served."""
    html = httpx.get(url).text
    assert "default-src 'none'" in html
    assert not re.search(r"<style|style=|\son\w+=|<script(?![^>]*src=)", html)
    named = [name for name in re.findall(r'(?:src|href)="([^"]+)"', html) if name != "data:,"]
    assert named
    web = Path(__file__).parents[2] / "server" / "web"
    for name in [*named, *(f"web/{file.name}" for file in web.iterdir())]:
        assert httpx.get(f"{url}/{name}").status_code == 200
    for file in web.iterdir():
        assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|document\.write", file.read_text()), file.name
