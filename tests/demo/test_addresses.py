"""Whose request it is; what a visitor writes into a header counts only where a proxy stands."""

import pytest
from starlette.requests import HTTPConnection

from demo.addresses import address_of


@pytest.mark.parametrize(
    ("client", "forwarded", "proxies", "address"),
    [
        ("192.0.2.1", [], None, "192.0.2.1"),
        ("192.0.2.1", ["198.51.100.7"], None, "192.0.2.1"),
        ("192.0.2.1", ["198.51.100.7"], 1, "198.51.100.7"),
        ("192.0.2.1", ["1.1.1.1, 198.51.100.7"], 1, "198.51.100.7"),  # the first is invented
        ("192.0.2.1", ["1.1.1.1", "198.51.100.7"], 1, "198.51.100.7"),
        ("192.0.2.1", ["1.1.1.1, 198.51.100.7, 10.0.0.1"], 2, "198.51.100.7"),
        ("192.0.2.1", ["10.0.0.1"], 2, "192.0.2.1"),  # it came around a proxy
        ("192.0.2.1", [], 2, "192.0.2.1"),
        ("192.0.2.1", ["unknown"], 1, "unknown"),
        ("2001:db8:1:2:3::4", [], None, "2001:db8:1:2::/64"),
        ("192.0.2.1", ["2001:db8:1:2:ffff::9"], 1, "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.1", [], None, "192.0.2.1"),
        (None, [], None, ""),
    ],
)
def test_address(client, forwarded, proxies, address):
    headers = [(b"x-forwarded-for", value.encode()) for value in forwarded]
    client = client and (client, 5000)
    request = HTTPConnection({"type": "http", "client": client, "headers": headers})
    assert address_of(request, proxies) == address
