"""The page of `cgspn show` in a browser: clicks, keys, addresses, widths. Needs chromium, chromedriver and selenium."""

import shutil

import pytest
import torch
from test_show import cosines

from cgspn.report.photographs import load_photographs
from cgspn.report.show import look_at
from cgspn.report.show_page import show_page
from cgspn.teachers import convert, load_embedded_teacher

pytest.importorskip("selenium", reason="selenium is not installed; run: pip install -e '.[dev]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="no chromium or no chromedriver; on Debian: apt install chromium-driver"
)

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def shown():
    torch.manual_seed(0)
    teacher = load_embedded_teacher().image.requires_grad_(False)
    student = convert(teacher, compression=4, keep_attention=1).requires_grad_(False)
    return look_at(load_photographs("embedded", 56, 4, 2)[0], student, teacher, layers=[1, 2, 3, 4])


@pytest.fixture(scope="module")
def address(shown, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(show_page(shown, {"student": "s", "teacher": "t"}, {}))
    return path.as_uri()


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(CHROMEDRIVER))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture
def browser(started, address):
    """The page, freshly loaded on a desktop; at the end nothing may have been complained of."""
    resize(started, 1280, 900)
    visit(started, address)
    yield started
    assert [e["message"] for e in started.get_log("browser") if e["level"] in ("SEVERE", "WARNING")] == []


def visit(driver, address):
    driver.get("about:blank")  # else another hash alone would not load the page again
    driver.get(address)
    wait = (
        "const done = arguments[0], look = () => document.documentElement.dataset.ready ? done() : setTimeout(look, 50)"
    )
    driver.execute_async_script(f"{wait}; look()")


def resize(driver, width, height):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def pixels(driver, selector):
    """What a canvas of the first photograph holds."""
    return driver.execute_script(
        "const c = document.querySelector('#photo-1 ' + arguments[0] + ' canvas');"
        "const copy = new OffscreenCanvas(c.width, c.height).getContext('2d', {willReadFrequently: true});"
        "copy.drawImage(c, 0, 0);"
        "return copy.getImageData(0, 0, c.width, c.height).data.join()",
        selector,
    )


def press(driver, choice, value, photo=1):
    button = f"#photo-{photo} [data-choice={choice}][data-value='{value}']"
    driver.execute_script("document.querySelector(arguments[0]).click()", button)


def click_at(driver, selector, row, column, rows=14, columns=14):
    """A real click in the middle of a cell."""
    from selenium.webdriver import ActionChains

    stage = driver.find_element("css selector", selector)
    driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", stage)
    size = stage.size
    x, y = (column + 0.5) * size["width"] / columns, (row + 0.5) * size["height"] / rows
    chain = ActionChains(driver)
    chain.move_to_element_with_offset(stage, x - size["width"] / 2, y - size["height"] / 2).click().perform()


def test_a_click_on_either_picture_changes_the_heat_of_both(browser, shown):
    before = {name: pixels(browser, f"[data-model={name}]") for name in ("teacher", "student")}
    click_at(browser, "#photo-1 [data-model=student] .stage", 3, 5)
    assert "#photo-1/patch=3,5/" in browser.current_url
    for name, was in before.items():
        assert pixels(browser, f"[data-model={name}]") != was
    descriptors = shown.views[0].descriptors
    for i, name in enumerate(("teacher", "student")):
        found = browser.execute_script("return Array.from(views.get('photo-1').maps[arguments[0]])", i)
        expected = cosines(descriptors[name], (3, 5)).flatten()
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, atol=1e-5, rtol=0)
    assert "row 4, column 6" in browser.find_element("css selector", "#photo-1 .readout").text


def test_arrow_keys_move_the_patch_and_stop_at_the_edge(browser):
    click_at(browser, "#photo-1 [data-model=teacher] .stage", 1, 12)
    stage = browser.find_element("css selector", "#photo-1 [data-model=teacher] .stage")
    for key, patch in (("\ue013", "0,12"), ("\ue013", "0,12"), ("\ue014", "0,13"), ("\ue015", "1,13")):
        stage.send_keys(key)
        assert f"patch={patch}/" in browser.current_url


def test_layer_patch_and_scale_choose_what_is_painted(browser):
    down = "[data-flow=student-down]"
    first = pixels(browser, down)
    press(browser, "layer", 1)
    second = pixels(browser, down)
    press(browser, "point", 1)
    third = pixels(browser, down)
    assert len({first, second, third}) == 3
    shared = pixels(browser, "[data-model=student]") + pixels(browser, "[data-model=teacher]")
    press(browser, "scale", "own")
    assert pixels(browser, "[data-model=student]") + pixels(browser, "[data-model=teacher]") != shared
    # downwards from above, and from nowhere else: what is below the ring is not painted
    row = int(browser.execute_script("return views.get('photo-1').meta.points[1][0]"))
    alpha = torch.tensor([int(v) for v in third.split(",")]).view(14, 14, 4)[..., 3]
    assert int(alpha[row + 1 :].max()) == 0
    assert int(alpha[: row + 1].max()) > 200


def test_only_the_pictures_of_the_layer_are_there(browser):
    shown = (
        "return [...document.querySelectorAll('#photo-1 [data-flow]')].filter(f => !f.hidden).map(f => f.dataset.flow)"
    )
    found = {}
    for layer in (1, 2, 3, 4):
        press(browser, "layer", layer)
        found[layer] = browser.execute_script(shown)
    assert sorted(map(len, found.values())) == [2, 6, 6, 6]
    assert min(found.values(), key=len) == ["student-attention", "teacher-attention"]


def test_an_address_brings_a_view_back(browser, address):
    browser.execute_script("document.querySelector('#photo-2 summary').click()")  # only the first is unfolded
    click_at(browser, "#photo-2 [data-model=teacher] .stage", 9, 2)
    press(browser, "layer", 3, photo=2)
    press(browser, "point", 2, photo=2)
    press(browser, "scale", "own", photo=2)
    url, was = browser.current_url, browser.execute_script("return [...views.get('photo-2').maps[0]].join()")
    assert url.endswith("#photo-2/patch=9,2/scale=own/point=2/layer=3")
    visit(browser, url)
    assert browser.execute_script("return [...views.get('photo-2').maps[0]].join()") == was
    pressed = "return [...document.querySelectorAll('#photo-2 [aria-pressed=true]')].map(b => b.dataset.value)"
    assert browser.execute_script(pressed) == ["own", "2", "3"]
    top = browser.execute_script("return document.querySelector('#photo-2').getBoundingClientRect().top")
    assert -5 < top < 50
    for nonsense in ("#photo-9/patch=1,1", "#photo-1/patch=999,-4/layer=77/point=x/scale=", "#photo-1/%", "#reading"):
        visit(browser, address + nonsense)


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_wider_than_the_screen(browser, width):
    resize(browser, width, 800)
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    stage = browser.find_element("css selector", "#photo-1 [data-model=student] .stage")
    assert stage.size["width"] >= 140
    if width < 400:
        button = browser.find_element("css selector", "#photo-1 [data-choice=layer]")
        assert min(button.size["width"], button.size["height"]) >= 44
        press(browser, "point", 1)
        click_at(browser, "#photo-1 [data-model=student] .stage", 13, 0)
        assert "patch=13,0/" in browser.current_url
