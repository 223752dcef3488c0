"""The chat page in a real browser, without a screen."""

import contextlib
import shutil
import time
from collections.abc import Iterator

import pytest
from tests.infer.serve.harness import saying, worded
from tests.infer.serve.live import serving

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install 'orogen[peer]'")
BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs a browser: apt-get install chromium chromium-driver"),
]
ANSWER = "hm é\n</think>\nUse `pip` <b>so</b>:\n```\nx = 1 < 2\n```\nDone."


@contextlib.contextmanager
def browser(port: int, *, width: int = 1000, height: int = 800) -> Iterator:
    """A browser that shows the page."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={width},{height}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.get(f"http://127.0.0.1:{port}/")
        yield driver
        faults = [line for line in driver.get_log("browser") if line["level"] == "SEVERE"]
        assert [f for f in faults if "status of 4" not in f["message"] and "status of 5" not in f["message"]] == []
    finally:
        driver.quit()


def find(driver, selector: str):
    return driver.find_element("css selector", selector)


def until(fact, seconds: float = 15):
    """The first true value of `fact()`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := fact():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not in {seconds} s")


def say(driver, text: str) -> None:
    find(driver, "#say").send_keys(text)
    find(driver, "#go").click()


def texts(driver, selector: str) -> list[str]:
    return [node.get_attribute("textContent") for node in driver.find_elements("css selector", selector)]


def test_a_chat():
    engine = worded(script=saying(ANSWER), wait=0.002)
    with serving(engine, words=True) as (port, _), browser(port) as driver:
        assert until(lambda: find(driver, "#model").text) == "tiny"
        assert find(driver, "#go").get_attribute("disabled")
        say(driver, "hi <script>alert(1)</script>")
        (facts,) = until(lambda: texts(driver, ".turn.assistant .facts"))
        assert "tokens/s" in facts and "first after" in facts
        assert texts(driver, ".turn.user .text") == ["hi <script>alert(1)</script>"]
        assert texts(driver, ".turn.assistant > .text") == ["Use pip <b>so</b>:x = 1 < 2Done."]
        assert (
            texts(driver, ".turn.assistant pre code") == ["x = 1 < 2"]
            and driver.find_elements("css selector", "b") == []
        )
        details = find(driver, "details.thought")
        assert not details.get_attribute("open") and texts(driver, "details.thought .text") == ["hm é"]
        find(driver, "details.thought summary").click()
        assert details.get_attribute("open")
        say(driver, "and again")
        until(lambda: len(texts(driver, ".turn.assistant .facts")) == 2)
        asked = len(engine.seen[1].prompt)
        assert asked > len(engine.seen[0].prompt), "the first turn goes along"
        find(driver, "#anew").click()
        assert texts(driver, ".turn") == [] and find(driver, "#hello").is_displayed()


def test_stop_and_settings():
    engine = worded(script=saying("</think>" + "the city " * 400), wait=0.02)
    with serving(engine, words=True) as (port, service), browser(port) as driver:
        assert not find(driver, "#settings").is_displayed()
        find(driver, "#more").click()
        find(driver, "#system").send_keys("Be kind.")
        find(driver, "#think").click()
        say(driver, "hi")
        until(lambda: any("city" in text for text in texts(driver, ".turn.assistant > .text")))
        assert find(driver, "#go").get_attribute("aria-label") == "Stop"
        find(driver, "#go").click()
        until(lambda: texts(driver, ".turn.assistant .facts") == ["Stopped"])
        until(lambda: service.open == 0 and not engine.busy)
        assert find(driver, "#go").get_attribute("aria-label") == "Send"
        from tests.infer.chats import backend

        say(driver, "more")
        until(lambda: any("city" in text for text in texts(driver, ".turn.assistant:last-child > .text")))
        find(driver, "#anew").click()
        until(lambda: service.open == 0 and find(driver, "#go").get_attribute("aria-label") == "Send")
        say(driver, "hi")
        until(lambda: len(engine.seen) == 3)
        assert engine.seen[2].prompt == engine.seen[0].prompt, "a new chat holds nothing of the answer that was stopped"
        prompt = backend().decode(list(engine.seen[0].prompt), skip_special_tokens=False)
        assert "system\nBe kind.<|im_end|>" in prompt and prompt.endswith("<think></think>")


def test_a_key_errors_and_a_model_without_chats():
    with serving(worded(), words=False, key="secret", limit=1) as (port, _), browser(port) as driver:
        until(lambda: "needs an API key" in find(driver, "#model").text)
        find(driver, "#more").click()
        find(driver, "#key").send_keys("secret\t")
        until(lambda: find(driver, "#model").text == "tiny")
        assert find(driver, "#greeting").text == "Begin a text, the model goes on."
        say(driver, "once")
        assert "no tokenizer" in until(lambda: texts(driver, ".fault"))[0]


def test_on_a_phone():
    with (
        serving(worded(script=saying(ANSWER)), words=True) as (port, _),
        browser(port, width=390, height=844) as driver,
    ):
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                               {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True})  # fmt: skip
        until(lambda: find(driver, "#model").text)
        say(driver, "a" * 300)
        until(lambda: texts(driver, ".turn.assistant .facts"))
        assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        sizes = [find(driver, s).size for s in ("#go", "#more", "#anew")]
        assert all(size["height"] >= 38 for size in sizes)
        assert find(driver, "#say").rect["y"] + find(driver, "#say").size["height"] <= 844
