"""Names that others wrote are shown visibly, in a bounded length, without secrets."""

import time

import pytest

from ppleval.shown import listed, shown, shown_message, without_secrets

SHOWN = {
    "plain": ("data/Übung 漢字 🎉.jsonl", "data/Übung 漢字 🎉.jsonl"),
    "escape": ("a\x1b[31mb", r"a\x1b[31mb"),
    "8-bit escape": ("a\x9b31mb", r"a\x9b31mb"),
    "NUL and DEL": ("a\0b\x7f", r"a\x00b\x7f"),
    "line ends": ("a\r\nb\u2028c\u0085d\x0b", r"a\r\nb\u2028c\x85d\x0b"),
    "right to left": ("a\u202eb\u2066c\u200fd", r"a\u202eb\u2066c\u200fd"),
    "half a character": ("a\ud800b", r"a\ud800b"),
    "nothing to see": ("a\u200bb\ufeff\U000e0041", r"a\u200bb\ufeff\U000e0041"),
    "joiners": ("👩\u200d👧 می\u200cخواهم", "👩\u200d👧 می\u200cخواهم"),
}


@pytest.mark.parametrize(("name", "expected"), SHOWN.values(), ids=SHOWN)
def test_what_is_invisible_is_an_escape(name, expected):
    assert shown(name) == expected


def test_a_long_name_keeps_its_ends_and_tells_how_much_is_left_out():
    found = shown("begin" + "x" * 10_000 + "end")
    assert len(found) <= 200
    assert found.startswith("beginxxx")
    assert found.endswith("xxxend")
    head, count, tail = found.replace("...[", " more]...").split(" more]...")
    assert int(count.replace(",", "")) == 10_008 - len(head) - len(tail)
    assert shown(found) == found
    assert len(shown("\x1b" * 10_000, 40)) <= 40


def test_a_message_is_one_line():
    assert shown_message("one\ntwo\r\n  three\x1b") == r"one two three\x1b"


# Addresses with secrets -> without.
SECRETS = {
    "s3://KEY:SECRET@bucket/a.csv": "s3://***@bucket/a.csv",
    "s3://KEY:SEC/RET@bucket/a.csv": "s3://***@bucket/a.csv",
    "s3:/KEY:SECRET@bucket/a.csv": "s3:/***@bucket/a.csv",  # as pathlib writes it
    "https://hf_token@huggingface.co/a/b": "https://***@huggingface.co/a/b",
    "https://user:p@ss@host/x": "https://***@host/x",
    "https://h/x?a=1&X-Amz-Signature=S&X-Amz-Credential=S#access_token=S": (
        "https://h/x?a=1&X-Amz-Signature=***&X-Amz-Credential=***#access_token=***"
    ),
    "gs://b/x?sig=S&token=S": "gs://b/x?sig=***&token=***",
    "cannot read 's3://K:S@b/x', see s3://L:S@c": "cannot read 's3://***@b/x', see s3://***@c",
}
WITHOUT = [
    "hf://datasets/user/name@main/x.csv",
    "http://localhost:8000/user@home",
    r"C:/Users/me@home/x",
    "me@home: a=1&token=2",
    "s3://bucket/x?region=eu",
]


@pytest.mark.parametrize(("address", "expected"), SECRETS.items())
def test_secrets_of_an_address_are_left_out(address, expected):
    assert without_secrets(address) == expected
    assert shown(shown(address)) == expected


@pytest.mark.parametrize("address", WITHOUT)
def test_an_address_without_secrets_stays(address):
    assert without_secrets(address) == address


@pytest.mark.parametrize(
    "name", [":/a:" * 250_000 + "@", "aa://" + "?token" * 200_000, "a:" + "/" * 10**6 + "@"]
)
def test_a_hostile_name_takes_no_time(name):
    begin = time.perf_counter()
    shown(name)
    assert time.perf_counter() - begin < 1


def test_of_many_names_those_nearest_are_listed():
    assert listed([]) == "none"
    assert listed(["a", "b\n"]) == r"a, b\n"
    names = [f"column{i}" for i in range(1000)] + ["x"] * 10**6
    found = listed(names, near="colunm77")
    assert found.startswith("column77, ")
    assert found.endswith(", and 1,000,992 more")
    assert listed(["y"] * 20, 2, near="a") == "y, y, and 18 more"
