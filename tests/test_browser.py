"""The pages of a run and of an ablation in a browser: silent, offline, on a phone and a desktop, in light and dark, by keyboard."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ablations import made as ablation
from axe_playwright_python.sync_playwright import Axe
from checkout import TINY
from playwright.sync_api import Browser, Page, sync_playwright
from stages.made import PRICED, benchmark, calibration, inputs, policy, signals

from papo.ablations.plan import expand
from papo.ablations.results import gather, write
from papo.ablations.work import Place
from papo.engines.reporting.plots import DARK, LIGHT
from papo.params import AdvantageParams, ReportParams
from papo.stages import advantage, report
from papo.store.files import write_json
from papo.store.manifest import Context

ROUNDS = 24


def run_page(folder: Path, round_in: Any) -> Path:
    """The page of a run of 24 rounds that has every section: notes, tiers, a gallery, the cost of judging, calibrations."""
    rng = np.random.default_rng(0)
    rise = np.linspace(0.0, 1.0, ROUNDS)
    course = [
        signals(
            k, accuracy=0.3 + 0.3 * x + 0.02 * noise, prm_mean=0.5 + 0.2 * x, prm_mean_correct=0.6 + 0.2 * x,
            lam_max=0.69, lam_max_exceeded=1.0, zero_advantage_share_all_correct=0.1 + 0.2 * x, zero_advantage_share=0.3 + 0.2 * x,
        )
        for k, (x, noise) in enumerate(zip(rise.tolist(), rng.standard_normal(ROUNDS).tolist(), strict=True))
    ]  # fmt: skip
    course[9]["judge_failure_share"] = course[9]["judge_failure_share_timeout"] = 0.25
    between = {f"round-{k}": policy(0.4 + 0.005 * k) for k in (7, 15)}
    evaluation = {
        "sums-in-range": benchmark(0.4, 0.55) | between,
        "a-benchmark-of-a-rather-long-name": benchmark(0.2, 0.21, missing=3) | between,
    }
    given = inputs(folder, course, evaluation, steps=4, judging=[PRICED] * ROUNDS)
    for name in ("sums", "mine"):
        write_json(folder / f"{name}.json", calibration(data=name))
    given = dataclasses.replace(
        given,
        tables=_responses(folder, round_in, rng),
        calibrations={name: folder / f"{name}.json" for name in ("sums", "mine")},
        lineage="0123456789ab",
    )
    context = Context(work=folder / "work")
    report.run(ReportParams(title="PAPO on sums, left to right"), given, folder / "report", context=context)
    return folder / "report/index.html"


def _responses(folder: Path, round_in: Any, rng: np.random.Generator) -> dict[str, Path]:
    """Problems that are solved by all, by none and by some; a response may be one long word."""
    answers = {f"{a}+{a + 1}+{2 * a}=?\n": str(4 * a + 1) for a in range(11, 35)} | {"1+" * 200 + "1=?": "201"}
    given = round_in(folder / "round", answers, group=6)
    rows = len(given.keys)
    outcomes = (rng.random(rows) < np.repeat(np.linspace(0.0, 1.2, len(answers)), 6)).astype(float)
    judged = [
        float(score) if right else None for score, right in zip(rng.choice([0, 0.5, 1], rows), outcomes, strict=True)
    ]
    texts = [f"11+12=23\n23+22={44 + k % 3}\n\\boxed{{{44 + k % 3}}}" if k % 5 else "9" * 400 for k in range(rows)]
    tables = {
        "rollouts": given.rollouts(completion=texts, completion_ids=[[5] * (4 + k % 9) for k in range(rows)],
                                   logprobs=[[-0.1] * (4 + k % 9) for k in range(rows)]),
        "orm": given.orm(outcomes.tolist()),
        "prm": given.prm(judged, reason=["The second step adds 22 to 23 and gets 44." if score is not None else "" for score in judged],
                         wrong_steps=[[0.0, 1.0, 0.0] if score == 0.5 else None for score in judged]),
    }  # fmt: skip
    tables["advantages"] = folder / "advantages.parquet"
    last = advantage.Inputs(0, tables["rollouts"], tables["orm"], tables["prm"])
    advantage.run(AdvantageParams(), last, tables["advantages"], context=Context(work=folder / "work"))
    return tables


VARIANTS = ("orm", "prm", "mult", "fullnorm", "papo", "gdpo")
LARGE = {"variant": "papo", "rollout.group_size": "8"}
RISES = {"measure": "change/zero_advantage_share", "arm": LARGE}
CLAIMS = [
    {"name": "1", "says": "With a judge such as `steps` the share rises", "paper": "40 to 69 %", "note": "By `steps` alone.",
     "needs": [RISES | {"is": "higher"}]},
    {"name": "2", "says": "The share falls", "needs": [RISES | {"is": "lower"}]},
    {"name": "3", "says": "GDPO ends above ORM",
     "needs": [{"measure": "accuracy/sums-hard", "arm": LARGE | {"variant": "gdpo"}, "against": LARGE | {"variant": "orm"},
                "is": "higher"}]},
]  # fmt: skip


def ablation_page(folder: Path) -> Path:
    """The page of made runs: claims of every answer, an axis of numbers, a fit, plots with six arms, a failed run."""
    plan = ablation.plan(
        title="What the process reward adds",
        about="Left-to-right sums. The judge `steps` is honest, `steps-gullible` pays for the look of completeness.",
        seeds=2, claims=CLAIMS, along="rollout.group_size", curves=["zero_advantage_share", "length_mean"],
        axes={"variant": {name: {"advantage.variant": name} for name in VARIANTS}, "rollout.group_size": [4, 8]},
        scaling={"benchmark": "sums-hard", "size": "rollout.group_size"},
    )  # fmt: skip
    place = Place(folder / "runs")
    with contextlib.chdir(folder):
        Path("params.yaml").write_text(yaml.safe_dump(TINY))
        *others, last = runs = expand(plan)
        for run in others:
            ablation.make_run(run, place, _chances, signals=_signals)
        ablation.make_run(
            last, place, _chances, how="failed", why="the loss is not finite: a gradient of lm_head is NaN"
        )
        return write(
            gather("made", plan, runs, place),
            place,
            command="papo ablate made --set run.rounds=8 --set tracking.enabled=false",
        )


def _chances(labels: Mapping[str, str], seed: int, policy: str, rng: np.random.Generator) -> np.ndarray:
    better = {"papo": 0.3, "prm": -0.1}.get(labels["variant"], 0.0)
    risen = {"warmstart": 0.0, "final": 1.0}.get(policy, 0.5)
    return np.linspace(0.1, 0.6, ablation.PROBLEMS) + better * risen


def _signals(labels: Mapping[str, str], seed: int, number: int, rng: np.random.Generator) -> dict[str, float]:
    place = VARIANTS.index(labels["variant"])
    return {
        "zero_advantage_share": 0.2 + 0.01 * place * number + 0.01 * rng.random(),
        "length_mean": 20.0 + place * number + rng.random(),
    }


# ---- the browser ----

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt install chromium")
PAGES = ("run", "ablation")
PALETTE = {"light": LIGHT, "dark": DARK}
SCHEMES = tuple(PALETTE)
VIEWS: dict[str, dict[str, Any]] = {
    "phone": {
        "viewport": {"width": 390, "height": 844},
        "device_scale_factor": 2,
        "is_mobile": True,
        "has_touch": True,
    },
    "desktop": {"viewport": {"width": 1280, "height": 900}},
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, round_in: Any) -> dict[str, Path]:
    return {
        "run": run_page(tmp_path_factory.mktemp("run"), round_in),
        "ablation": ablation_page(tmp_path_factory.mktemp("ablation")),
    }


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Its own sandbox takes user namespaces, which root in a container has not.
        browser = playwright.chromium.launch(executable_path=BROWSER, chromium_sandbox=False)
        yield browser
        browser.close()


@dataclasses.dataclass
class Opened:
    """A page in a browser that is offline, and what it said and asked for."""

    page: Page
    said: list[str]
    asked: list[str]


@contextlib.contextmanager
def opened(
    chromium: Browser, path: Path, view: str = "desktop", scheme: Any = "light", *, injected: bool = False
) -> Iterator[Opened]:
    """`injected`: scripts of the test may run in the page, which its policy forbids otherwise."""
    context = chromium.new_context(**VIEWS[view], color_scheme=scheme, offline=True, bypass_csp=injected)
    found = Opened(context.new_page(), [], [])
    found.page.on("console", lambda message: found.said.append(f"{message.type}: {message.text}"))
    found.page.on("pageerror", lambda error: found.said.append(str(error)))
    found.page.on("request", lambda request: found.asked.append(request.url))
    found.page.goto(path.as_uri())
    yield found
    context.close()


OPEN_ALL = "document.querySelectorAll('details').forEach(one => one.open = true)"
# What sticks out of the window, and what scrolls sideways without a name or a stop of the keyboard.
TOO_WIDE = """() => [...document.querySelectorAll("html, body *")].filter(one => {
    const scrolls = ["auto", "scroll"].includes(getComputedStyle(one).overflowX) && one.scrollWidth > one.clientWidth;
    if (scrolls && !one.matches("[tabindex='0'][role=region][aria-label]")) return true;
    const out = one.getBoundingClientRect().right > document.documentElement.clientWidth + 1;
    return out && (one.localName === "caption" || !one.parentElement?.closest(".scroll"));
  }).map(one => one.outerHTML.slice(0, 80))"""
SCRIPTS = """() => [...document.querySelectorAll("*")]
  .filter(one => one.localName === "script" || [...one.attributes].some(({name}) => name.startsWith("on")))
  .map(one => one.outerHTML.slice(0, 80))"""
FOCUSABLE = """() => [...document.querySelectorAll("a[href], summary, [tabindex='0']")]
  .filter(one => one.checkVisibility({contentVisibilityAuto: true}))
  .map((one, number) => (one.dataset.number = number, number))"""
FOCUSED = """() => { const one = document.activeElement, style = getComputedStyle(one);
  const seen = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1;
  return one === document.body ? null : [Number(one.dataset.number), seen]; }"""
CONTRASTS = """() => {
  const linear = x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
  const luminance = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(x => linear(x / 255));
    return .2126 * r + .7152 * g + .0722 * b + .05; };
  const page = luminance(getComputedStyle(document.body).backgroundColor);
  const ratio = one => luminance(getComputedStyle(one).fill) / page;
  return [...document.querySelectorAll("svg text")].map(one => Math.max(ratio(one), 1 / ratio(one))); }"""
SIZES = """() => [...document.querySelectorAll("svg text")].map(one => {
  const screen = one.getScreenCTM(); return parseFloat(getComputedStyle(one).fontSize) * Math.hypot(screen.a, screen.b); })"""
# Texts of plots that are cut off or lie on one another, and plots without a name; a pixel is no overlap.
UNREADABLE = """() => [...document.querySelectorAll("svg")].flatMap(svg => {
  const page = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll("text")];
  const boxes = texts.map(one => one.getBoundingClientRect());
  const out = texts.filter((_, i) => boxes[i].left < page.left - 1 || boxes[i].right > page.right + 1
    || boxes[i].top < page.top - 1 || boxes[i].bottom > page.bottom + 1);
  const over = texts.filter((_, i) => boxes.some((box, j) => j > i
    && Math.min(box.right, boxes[i].right) - Math.max(box.left, boxes[i].left) > 1
    && Math.min(box.bottom, boxes[i].bottom) - Math.max(box.top, boxes[i].top) > 1));
  const nameless = svg.matches("[role=img][aria-label]:not([aria-label=''])") ? [] : ["a plot has no name"];
  return [...out, ...over].map(one => `${svg.getAttribute("aria-label")}: ${one.textContent}`).concat(nameless); })"""


def violations(page: Page) -> list[str]:
    """Rules of axe-core that the page breaks, with the first element that does."""
    return [
        f"{one['id']}: {one['help']}: {one['nodes'][0]['html'][:120]}" for one in Axe().run(page).response["violations"]
    ]


# What the pages here must have for the other tests to look at it, as CSS selectors.
SHOWN = {
    "run": [".notes", "details.tiers", ".response.right", ".response.wrong", ".mark", ".cost", "footer", "svg"],
    "ablation": ["li.holds", "li.does-not-hold", "li.undecided", "nav a", "header code", "#runs .words", "svg"],
}


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_have_all_there_is_to_see(name: str, pages: dict[str, Path], chromium: Browser) -> None:
    with opened(chromium, pages[name]) as found:
        assert [selector for selector in SHOWN[name] if not found.page.locator(selector).count()] == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_silent_asks_for_nothing_and_fits(
    name: str, view: str, scheme: str, pages: dict[str, Path], chromium: Browser
) -> None:
    with opened(chromium, pages[name], view, scheme) as found:
        found.page.evaluate(OPEN_ALL)
        assert found.page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert found.page.evaluate(TOO_WIDE) == []
        assert found.page.evaluate(UNREADABLE) == []
        assert min(found.page.evaluate(CONTRASTS)) >= 4.5
        assert min(found.page.evaluate(SIZES)) >= 9.0
        assert found.said == []
        assert found.asked == [pages[name].as_uri()]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_no_script_and_would_run_none(name: str, pages: dict[str, Path], chromium: Browser) -> None:
    with opened(chromium, pages[name]) as found:
        policy = found.page.locator("meta[http-equiv='Content-Security-Policy']").get_attribute("content")
        assert policy == "default-src 'none'; style-src 'unsafe-inline'"
        assert found.page.evaluate(SCRIPTS) == []
        found.page.evaluate(
            "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
        )
        assert found.page.evaluate("window.ran === undefined")
        assert any("Content Security Policy" in said for said in found.said)


@pytest.mark.parametrize("name", PAGES)
def test_light_and_dark_are_two_pages(name: str, pages: dict[str, Path], chromium: Browser) -> None:
    backgrounds = []
    for scheme in SCHEMES:
        with opened(chromium, pages[name], scheme=scheme) as found:
            backgrounds.append(found.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert backgrounds == [
        f"rgb({', '.join(str(int(PALETTE[k]['page'][i : i + 2], 16)) for i in (1, 3, 5))})" for k in SCHEMES
    ]


@pytest.mark.parametrize("name", PAGES)
def test_the_keyboard_reaches_everything_in_order_and_shows_where_it_is(
    name: str, pages: dict[str, Path], chromium: Browser
) -> None:
    with opened(chromium, pages[name]) as found:
        expected = found.page.evaluate(FOCUSABLE)
        assert len(expected) >= 5
        reached = []
        for _ in expected:
            found.page.keyboard.press("Tab")
            reached.append(found.page.evaluate(FOCUSED))
        assert reached == [[number, True] for number in expected]
        found.page.keyboard.press("Tab")  # no trap at the end, nor on the way back
        assert found.page.evaluate(FOCUSED) is None
        for number in reversed(expected):
            found.page.keyboard.press("Shift+Tab")
            assert found.page.evaluate(FOCUSED) == [number, True]


def test_the_keyboard_opens_what_is_folded(pages: dict[str, Path], chromium: Browser) -> None:
    with opened(chromium, pages["run"]) as found:
        folded = found.page.locator("details:not([open])")
        count = folded.count()
        assert count >= 2
        for number, key in enumerate(("Enter", "Space"), 1):
            folded.first.locator("summary").press(key)
            assert folded.count() == count - number


@pytest.mark.parametrize(("name", "region"), [("run", "What judging cost, by round"), ("ablation", "Comparisons")])
def test_a_table_that_is_too_wide_for_a_phone_is_moved_by_keys(
    name: str, region: str, pages: dict[str, Path], chromium: Browser
) -> None:
    with opened(chromium, pages[name], "phone") as found:
        table = found.page.get_by_role("region", name=region)
        assert table.evaluate("one => one.scrollWidth > one.clientWidth")
        table.focus()
        table.press("ArrowRight")
        found.page.wait_for_function("one => one.scrollLeft > 0", arg=table.element_handle())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_breaks_no_rule_of_accessibility(
    name: str, scheme: str, pages: dict[str, Path], chromium: Browser
) -> None:
    with opened(chromium, pages[name], "phone", scheme, injected=True) as found:
        found.page.evaluate(OPEN_ALL)
        assert violations(found.page) == []


def test_what_is_wrong_with_a_page_is_seen(tmp_path: Path, chromium: Browser) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        "<!doctype html><html lang=en><title>Bad</title><meta name=viewport content='width=device-width, initial-scale=1'>"
        "<body style='background: #fff'><main><h1>Bad</h1>"
        "<script>console.error('oh'); nothing.at.all</script><img src='https://example.com/a.png' alt='a'>"
        "<p style='color: #bbb'>pale</p><p style='width: 900px'>wide</p>"
        "<div class=scroll style='overflow-x: auto'><table><caption>cut off<tr><td style='min-width: 800px'>moved</table></div>"
        "<svg><text y=9 font-size=5 fill='#ccc'>small</text><text y=9 font-size=5>over</text></svg><b onclick='go()'>b</b>"
        "<a href='#x' style='outline: none'>a</a></main>"
    )
    with opened(chromium, page, "phone", injected=True) as found:
        assert any("oh" in said for said in found.said)
        assert any("nothing is not defined" in said for said in found.said)
        assert "https://example.com/a.png" in found.asked
        wide = found.page.evaluate(TOO_WIDE)
        assert any("900px" in one for one in wide)
        assert any("overflow-x" in one for one in wide)
        assert any("cut off" in one and one.startswith("<caption") for one in wide)
        assert not found.page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert {"null: small", "a plot has no name"} <= set(found.page.evaluate(UNREADABLE))
        assert len(found.page.evaluate(SCRIPTS)) == 2
        assert min(found.page.evaluate(CONTRASTS)) < 4.5
        assert min(found.page.evaluate(SIZES)) < 9.0
        found.page.evaluate(FOCUSABLE)
        found.page.locator("a").focus()
        assert found.page.evaluate(FOCUSED) == [0, False]
        assert any(one.startswith("color-contrast") for one in violations(found.page))
