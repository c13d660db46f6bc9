"""Links to pictures: whoever has one fetches the picture, for as long as it says and no other."""

from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from gtl.storage import Store
from serve import links
from serve.links import link


def test_a_link_to_a_bucket_needs_no_credentials(s3: str) -> None:
    store = Store(f"{s3}/pictures of {Path(__file__).stem}")
    store.write("a.png", b"picture")
    found = link(store, "a.png", 60)
    asked = parse_qs(urlsplit(found).query)
    # The first version of signatures says when, the fourth for how long.
    assert asked.get("X-Amz-Expires") == ["60"] or int(asked["Expires"][0]) > 0
    answer = httpx.get(found)
    assert (answer.status_code, answer.content) == (200, b"picture")


def test_elsewhere_it_is_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert link(Store(tmp_path), "a.png", 60) == f"{tmp_path}/a.png"
    monkeypatch.setattr(links, "find_spec", lambda name: None)
    assert link(Store("s3://bucket/pictures"), "a.png", 60) == "s3://bucket/pictures/a.png"
