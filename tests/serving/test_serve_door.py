"""Who may ask, how often, and what becomes of those who ask for too much at once."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import pytest
from openai import AuthenticationError, OpenAI

from gtl.adapters import Registry
from serve.keys import new_key
from tests.endpoint import serving
from tests.ports import free_port
from tests.waiting import eventually

if TYPE_CHECKING:
    from playwright.sync_api import Browser


class Door(NamedTuple):
    url: str
    keys: dict[str, str]
    output: Path

    def ask(self, who: str, **fields: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.keys[who]}"}
        body = {"prompt": "a red circle", "num_inference_steps": 2, **fields}
        return httpx.post(f"{self.url}/v1/images/generations", json=body, headers=headers, timeout=120)


@pytest.fixture(scope="module")
def door(ray_cluster: None, shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    place = tmp_path_factory.mktemp("door")
    keys, lines = {}, []
    for name in ("ann", "bob", "eve"):
        keys[name], line = new_key(name)
        lines.append(line)
    (place / "keys").write_text("\n".join(lines))
    args: dict[str, Any] = {
        "keys": str(place / "keys"), "requests_per_minute": 120, "max_running": 2, "max_waiting": 3, "timeout_s": 30,
        "output": str(place / "out"), "keep_prompt": False, "refresh_s": 1, "limits": {"max_pixels": 512 * 512},
    }  # fmt: skip
    with serving(shelf, free_port(), **args) as url:
        yield Door(url, keys, place / "out")


def test_nobody_comes_in_without_a_key(door: Door) -> None:
    for path in ("/v1/models", "/v1/models/tiny", "/v1/adapters/dog", "/metrics"):
        assert httpx.get(f"{door.url}{path}").status_code == 401, path
    for path in ("/v1/images/generations", "/v1/images/edits", "/v1/registry/refresh"):
        answer = httpx.post(f"{door.url}{path}", content=b"{")
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), path
    for path in ("/healthz", "/readyz", "/"):
        assert httpx.get(f"{door.url}{path}").status_code == 200, path
    with pytest.raises(AuthenticationError):
        OpenAI(base_url=f"{door.url}/v1", api_key="gtl-wrong", max_retries=0).models.list()
    assert OpenAI(base_url=f"{door.url}/v1", api_key=door.keys["ann"]).models.list().data[0].id == "tiny"


def test_a_url_leads_to_the_picture(door: Door) -> None:
    """Its metadata keeps no prompt where the config says so."""
    from gtl.images import read_recipe

    (one,) = door.ask("ann", response_format="url").json()["data"]
    told = read_recipe(one["url"])
    assert Path(one["url"]).parent == door.output
    assert told["seed"] == one["seed"] and "prompt" not in told
    # The same once more, by whoever it is, is another file.
    (other,) = door.ask("bob", response_format="url", seed=one["seed"]).json()["data"]
    assert other["url"] != one["url"]


def test_an_alias_that_moves_is_followed_by_itself(door: Door, shelf: Path) -> None:
    def version() -> str:
        headers = {"Authorization": f"Bearer {door.keys['ann']}"}
        answer = httpx.get(f"{door.url}/v1/models/tiny:dog@prod", headers=headers, timeout=60)
        return str(answer.json()["gtl"]["version"])

    registry = Registry(shelf)
    assert version() == "v1"
    registry.promote("dog@v2", "prod")
    try:
        assert eventually(lambda: version() == "v2", 60)
    finally:
        registry.promote("dog@v1", "prod")


def test_more_than_fit_are_refused_and_none_that_was_taken_is_lost(door: Door) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda seed: door.ask("ann", seed=seed, num_inference_steps=60), range(12)))
    taken = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert {answer.status_code for answer in refused} == {429}
    assert {answer.json()["error"]["code"] for answer in refused} == {"overloaded"}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert len(taken) >= 5, "two in work and three that wait"
    assert len({answer.json()["data"][0]["b64_json"] for answer in taken}) == len(taken)


def test_what_is_not_done_in_time_is_given_up(door: Door) -> None:
    place, began = urlsplit(door.url), time.monotonic()
    with socket.create_connection((place.hostname, place.port), timeout=60) as wire:
        key = f"Authorization: Bearer {door.keys['bob']}\r\nContent-Type: application/json\r\nContent-Length: 99\r\n"
        wire.sendall(f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\n{key}\r\n{{".encode())  # and no more
        answer = door.ask("ann", num_inference_steps=200, n=2, size="512x512")
        assert (answer.status_code, answer.json()["error"]["code"]) == (408, "timeout")
        assert 29 < time.monotonic() - began < 60
        assert wire.recv(1000).startswith(b"HTTP/1.1 408"), "nor is a body waited for any longer"
    assert door.ask("ann").status_code == 200, "and what was given up is in nobody's way"


def test_a_key_has_its_rate_and_no_other_s(door: Door) -> None:
    def post() -> httpx.Response:
        headers = {"Authorization": f"Bearer {door.keys['eve']}"}
        return httpx.post(f"{door.url}/v1/registry/refresh", headers=headers, timeout=120)

    with ThreadPoolExecutor(60) as pool:  # at once: a slow machine answers one after the other no faster than its rate
        answers = list(pool.map(lambda _: post(), range(60)))
    late = [answer for answer in answers if answer.status_code == 429]
    assert late and {answer.status_code for answer in answers} == {200, 429}
    assert late[0].json()["error"]["code"] == "rate_limit_exceeded" and int(late[0].headers["retry-after"]) >= 1
    assert door.ask("bob").status_code == 200


def test_the_page_asks_for_a_key_sends_it_and_keeps_it_for_the_tab(door: Door, browser: "Browser") -> None:
    from playwright.sync_api import expect

    page = browser.new_page()
    page.goto(door.url)
    asks = page.get_by_role("dialog")
    expect(asks).to_contain_text("This endpoint asks for an API key")
    page.get_by_label("API key", exact=True).fill("wrong")
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator("#key-error")).to_have_text("this API key is not known")
    page.get_by_label("API key", exact=True).fill(door.keys["bob"])
    page.keyboard.press("Enter")
    expect(asks).to_be_hidden()
    generate = page.get_by_role("button", name="Generate")
    expect(generate).to_be_enabled()
    page.get_by_label("Prompt", exact=True).fill("a red circle")
    page.get_by_label("Steps").fill("2")
    generate.click()
    expect(page.locator("#caption")).to_be_visible()
    page.reload()
    expect(generate).to_be_enabled()
    assert page.evaluate("key => Object.values(localStorage).join().includes(key)", door.keys["bob"]) is False
    page.close()
