import hmac
import logging
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtl.types import UserError
from serve import keys
from serve.errors import ApiError
from serve.keys import KeyFile, RateLimiter, hash_key, new_key, parse_keys, share_out


def lines(*names: str) -> tuple[str, list[str]]:
    """The text of a file with a new key for each name, and the keys."""
    made = [new_key(name) for name in names]
    return "".join(f"{line}\n" for _, line in made), [key for key, _ in made]


def refusal(file: KeyFile, header: str | None) -> str:
    with pytest.raises(ApiError) as caught:
        file.check(header)
    assert caught.value.status_code == 401
    assert caught.value.headers == {"WWW-Authenticate": "Bearer"}
    assert caught.value.code == "invalid_api_key"
    return caught.value.message


def test_a_new_key_is_random_and_its_line_holds_only_its_hash() -> None:
    (key, line), (other, _) = new_key("ann"), new_key("ann")
    assert key != other
    assert key.startswith("gtl-")
    assert len(key) == 47
    assert line == f"ann {hash_key(key)}"
    assert key.removeprefix("gtl-") not in line
    with pytest.raises(UserError, match="^name: 'a b'"):
        new_key("a b")


def test_a_file_of_keys_is_read() -> None:
    a, b = "a" * 64, "B" * 64
    assert parse_keys(f"# who may\n\nann {a}\nann\t{b}  # the new one\n", "f") == {a: "ann", b.lower(): "ann"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f: holds no key"),
        ("# nothing\n", "f: holds no key"),
        ("ann\n", "f:1: expected NAME and the SHA-256"),
        ("\nann gtl-secret\n", "f:2: expected NAME and the SHA-256"),
        (f"ann {'a' * 63}\n", "f:1: expected NAME and the SHA-256"),
        (f"ann {'a' * 64} x\n", "f:1: expected NAME and the SHA-256"),
        (f"Ann {'a' * 64}\n", "f:1: 'Ann': a name starts with"),
        (f"ann {'a' * 64}\nbob {'A' * 64}\n", "f:2: bob: the key of ann once more"),
    ],
)
def test_a_wrong_line_is_named_and_what_stands_there_is_not_shown(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_keys(text, "f")
    assert str(caught.value).startswith(message)
    assert "gtl-secret" not in str(caught.value)


def test_a_header_tells_who_asks(tmp_path: Path) -> None:
    text, (ann, bob) = lines("ann", "bob")
    (tmp_path / "keys").write_text(text)
    file = KeyFile(tmp_path / "keys")
    assert [file.check(f"Bearer {ann}"), file.check(f"bearer  {bob} ")] == ["ann", "bob"]
    assert refusal(file, None) == "no API key; send it as the header Authorization: Bearer KEY"
    assert refusal(file, "") == refusal(file, None)
    for header in (ann, f"Basic {ann}", "Bearer", "Bearer ", f"Bearer {ann} {bob}"):
        assert refusal(file, header) == "Authorization: expected Bearer KEY"
    for header in (f"Bearer {ann}x", f"Bearer {ann[:-1]}", f"Bearer {hash_key(ann)}", "Bearer \xff"):
        assert refusal(file, header) == "this API key is not known"


def test_every_hash_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, (ann, _, _) = lines("ann", "bob", "cat")
    (tmp_path / "keys").write_text(text)
    file, compare, compared = KeyFile(tmp_path / "keys"), hmac.compare_digest, list[str]()

    def watched(a: str, b: str) -> bool:
        compared.append(a)
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    assert file.check(f"Bearer {ann}") == "ann"
    assert len(compared) == 3


def test_a_change_of_the_file_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    (text, (ann,)), (other, (bob,)) = lines("ann"), lines("bob")
    path.write_text(text)
    file = KeyFile(path)
    assert file.check(f"Bearer {ann}") == "ann"
    path.write_text(text + other)
    assert [file.check(f"Bearer {key}") for key in (ann, bob)] == ["ann", "bob"]
    # Of one size and, as a file system with coarse clocks has it, of one time: the file itself is another.
    replaced = tmp_path / "new"
    replaced.write_text(other)
    path.write_text(text)
    assert file.check(f"Bearer {ann}") == "ann"
    os.utime(replaced, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    replaced.rename(path)
    assert file.check(f"Bearer {bob}") == "bob"
    assert refusal(file, f"Bearer {ann}") == "this API key is not known"


def test_while_the_file_is_wrong_the_keys_that_it_had_hold(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys"
    (text, (ann,)), (other, (bob,)) = lines("ann"), lines("bob")
    path.write_text(text)
    file = KeyFile(path)
    for damage in ("ann gtl-secret\n", "", None, other):
        if damage is None:
            path.unlink()
        else:
            path.write_text(damage)
        caplog.clear()
        with caplog.at_level(logging.ERROR, "serve.keys"):
            for _ in range(3):
                key = bob if damage == other else ann
                assert file.check(f"Bearer {key}") == ("bob" if damage == other else "ann")
        assert len(caplog.records) == (0 if damage == other else 1)
        assert "secret" not in caplog.text


def test_a_file_that_is_missing_at_the_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"keys .*/keys: cannot be read"):
        KeyFile(tmp_path / "keys")
    (tmp_path / "keys").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"keys .*/keys: cannot be read"):
        KeyFile(tmp_path / "keys")


class Hand:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_and_then_one_by_one() -> None:
    clock = Hand()
    limiter = RateLimiter(per_minute=30, burst=3, clock=clock)
    assert [limiter.take("a") for _ in range(4)] == [0, 0, 0, 2]
    assert limiter.take("b") == 0  # another key has its own
    clock.now = 1.5
    assert limiter.take("a") == 0.5
    clock.now = 2
    assert [limiter.take("a"), limiter.take("a")] == [0, 2]
    with pytest.raises(ApiError) as caught:
        limiter.admit("a")
    assert (caught.value.status_code, caught.value.headers) == (429, {"Retry-After": "2"})
    clock.now = 1e6
    assert [limiter.take("a") for _ in range(4)] == [0, 0, 0, 2]  # no more than the burst is saved up


@given(
    per_minute=st.floats(0.1, 6000),
    burst=st.integers(1, 20),
    pauses=st.lists(st.floats(0, 100), max_size=60),
)
def test_in_no_window_more_than_the_burst_and_the_rate(per_minute: float, burst: int, pauses: list[float]) -> None:
    clock, admitted = Hand(), []
    limiter = RateLimiter(per_minute, burst, clock)
    for pause in pauses:
        clock.now += pause
        wait = limiter.take("a")
        if not wait:
            admitted.append(clock.now)
            continue
        assert wait <= 60 / per_minute * (1 + 1e-6)
        before = clock.now
        clock.now += wait * (1 - 1e-3)
        assert limiter.take("a") > 0  # not too early
        clock.now = before + wait
        assert limiter.take("a") == 0  # and not a moment too late
        admitted.append(clock.now)
    for i, begin in enumerate(admitted):
        for j in range(i, len(admitted)):
            assert j - i + 1 <= burst + (admitted[j] - begin) * per_minute / 60 + 1e-6


def test_buckets_that_are_full_again_are_dropped() -> None:
    clock = Hand()
    limiter = RateLimiter(per_minute=60, burst=2, clock=clock)
    for i in range(10_000):
        clock.now += 0.01
        assert limiter.take(f"k{i}") == 0
    assert len(limiter._buckets) <= keys.FULL_AGAIN + 1
    assert limiter.take("k9999") == 0
    assert limiter.take("k9999") > 0  # what is not full again is kept


def test_a_rate_is_shared_out_between_ingresses() -> None:
    assert share_out(None, 3) is None
    alone, one = share_out(120, 1), share_out(120, 4)
    assert alone and one
    assert (alone.per_minute, alone.burst) == (120, 20)
    assert (one.per_minute, one.burst) == (30, 5)
    assert [one.take("ann") == 0 for _ in range(6)] == [True] * 5 + [False]
    with pytest.raises(ApiError) as caught:
        one.admit("ann")
    assert caught.value.message.startswith("more than 30 requests a minute with this key at this one of 4 ingresses;")
    slow = share_out(1, 8)
    assert slow and slow.burst == 1
