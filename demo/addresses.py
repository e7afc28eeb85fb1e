"""Which visitor a request comes from."""

import ipaddress

from starlette.requests import HTTPConnection


def address_of(request: HTTPConnection, proxies: int | None) -> str:
    """The visitor's address. Of an IPv6 address the network, in which one visitor has them all.

    Args:
        proxies: how many stand in front of the server, each of which adds the address that it sees
            to X-Forwarded-For. What stands further left in that header may be invented.
    """
    address = request.client.host if request.client is not None else ""
    if proxies is not None:
        forwarded = ",".join(request.headers.getlist("x-forwarded-for")).split(",")
        if len(forwarded) >= proxies:
            address = forwarded[-proxies].strip()
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if found.version == 6:
        return str(found.ipv4_mapped or ipaddress.ip_network((found, 64), strict=False))
    return str(found)
