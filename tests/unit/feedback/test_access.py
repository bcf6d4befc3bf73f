"""Tokens, and whose name a request was sent to."""

from __future__ import annotations

import pytest

from lit_instruct.feedback.access import is_loopback, is_own_host, labeler_of, new_token, token_hash


def test_tokens_find_their_labeler() -> None:
    ann, bob = new_token(), new_token()
    assert len({ann, bob}) == 2
    assert len(ann) == 43
    hashes = {"ann": token_hash(ann), "bob": token_hash(bob), "cat": None}
    assert labeler_of(f"Bearer {ann}", hashes) == "ann"
    assert labeler_of(f"bearer {bob}", hashes) == "bob"
    for sent in (
        None,
        "",
        "Bearer",
        "Bearer ",
        ann,
        f"Basic {ann}",
        f"Bearer {ann[:-1]}",
        f"Bearer {ann}x",
        "Bearer \udcff",
    ):
        assert labeler_of(sent, hashes) is None
    assert labeler_of(f"Bearer {hashes['ann']!r}", hashes) is None
    assert labeler_of(f"Bearer {token_hash(ann).hex()}", hashes) is None  # what is stored opens nothing


@pytest.mark.parametrize(
    "header", ["127.0.0.1:80", "127.0.0.1", "localhost:8642", "LOCALHOST", "[::1]:80", "127.0.0.2:1"]
)
def test_names_of_this_machine(header: str) -> None:
    assert is_own_host(header, "127.0.0.1")


@pytest.mark.parametrize(
    "header", ["", ":80", "evil.example", "evil.example:8642", "127.0.0.1.evil.example", "localhost.evil.example:80",
               "192.168.0.5:8642", "127.0.0.1@evil.example", "2130706433", "0.0.0.0:8642", "[::]:80"],
)  # fmt: skip
def test_names_of_others(header: str) -> None:
    assert not is_own_host(header, "127.0.0.1")


def test_a_remote_host_is_known_by_its_one_name() -> None:
    assert is_own_host("192.168.0.5:8642", "192.168.0.5")
    assert is_own_host("Lab.local:8642", "lab.local")
    assert not is_own_host("192.168.0.6:8642", "192.168.0.5")
    assert not is_own_host("evil.example:8642", "192.168.0.5")


def test_loopback() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "::1", "localhost", "127.9.9.9"]))
    assert not any(map(is_loopback, ["192.168.0.5", "0.0.0.0", "::", "example.org", ""]))
