"""Who may bind what."""

from __future__ import annotations

import grp
import os
import pwd

import pytest

from dataplane.config_access import AccessSettings
from dataplane.control.access import Access, groups_of

OWNER, OTHER = 1000, 2000


def may(access: Access, uid: int, proto: str, address: str | None = None, number: int = 0, gid: int = 99999) -> bool:
    try:
        access.demand(uid, gid, proto, address, number)
    except PermissionError:
        return False
    return True


@pytest.mark.parametrize(("uid", "port", "allowed"), [
    (0, 53, True), (0, 5000, True), (0, 0, True), (OWNER, 53, False), (OWNER, 1023, False), (OWNER, 1024, True),
    (OWNER, 0, True), (OTHER, 53, False), (OTHER, 5000, False), (OTHER, 0, False),
])
def test_without_rules(uid: int, port: int, allowed: bool) -> None:
    assert may(Access(OWNER, []), uid, "udp", None, port) is allowed


@pytest.mark.parametrize(("uid", "port", "allowed"), [
    (0, 80, True), (OWNER, 80, False), (OWNER, 8080, True), (OTHER, 8080, False)])
def test_listening_without_rules(uid: int, port: int, allowed: bool) -> None:
    assert may(Access(OWNER, []), uid, "tcp", None, port) is allowed


def test_connecting() -> None:
    """The rule is about the remote end: no port there is anybody's privilege."""
    assert may(Access(OWNER, []), OWNER, "connect", "192.0.2.1", 80)
    assert not may(Access(OWNER, []), OTHER, "connect", "192.0.2.1", 80)
    access = Access(OWNER, [AccessSettings(uid=OTHER, allow=("connect:443", "connect:192.0.2.1:1-100", "tcp:8080"))])
    allowed = [("connect", "198.51.100.1", 443), ("connect", "192.0.2.1", 80), ("tcp", None, 8080)]
    refused = [("connect", "198.51.100.1", 80), ("connect", "192.0.2.1", 101), ("connect", "192.0.2.1", 8080),
               ("tcp", None, 443)]
    assert [may(access, OTHER, *what) for what in allowed] == [True] * len(allowed)
    assert [may(access, OTHER, *what) for what in refused] == [False] * len(refused)


def test_without_rules_raw_and_tap_are_the_owners() -> None:
    access = Access(OWNER, [])
    for proto, number in (("raw", 0), ("raw", 1), ("tap", 0)):
        assert may(access, 0, proto, None, number) and may(access, OWNER, proto, None, number)
        assert not may(access, OTHER, proto, None, number)


def test_a_users_rules() -> None:
    access = Access(OWNER, [AccessSettings(uid=OTHER, allow=("udp:53", "udp:10.0.0.1:70", "raw:1")),
                            AccessSettings(uid=OTHER, allow=("udp:5000-5010",))])
    allowed = [("udp", None, 53), ("udp", "10.9.9.9", 53), ("udp", "10.0.0.1", 70), ("raw", None, 1),
               ("udp", None, 5010)]
    refused = [("udp", None, 70), ("udp", "10.0.0.2", 70), ("raw", None, 0), ("raw", None, 2), ("udp", None, 0),
               ("udp", None, 5011), ("tap", None, 0)]
    assert [may(access, OTHER, *what) for what in allowed] == [True] * len(allowed)
    assert [may(access, OTHER, *what) for what in refused] == [False] * len(refused)
    assert not may(access, OTHER + 1, "udp", None, 53)


def test_every_port_needs_the_rule_for_every_port() -> None:
    assert may(Access(OWNER, [AccessSettings(uid=OTHER, allow=("udp:*",))]), OTHER, "udp")
    assert not may(Access(OWNER, [AccessSettings(uid=OTHER, allow=("udp:1-65535",))]), OTHER, "udp")


def test_the_owner_gets_low_ports_by_a_rule() -> None:
    access = Access(os.geteuid(), [AccessSettings(uid="owner", allow=("udp:53",))])
    assert may(access, os.geteuid(), "udp", None, 53)


def test_a_groups_rules() -> None:
    access = Access(OWNER, [AccessSettings(gid=4242, allow=("udp:5000",))])
    assert may(access, OTHER, "udp", None, 5000, gid=4242)
    assert not may(access, OTHER, "udp", None, 5000, gid=4243)


def test_supplementary_groups_count() -> None:
    user = next((pwd.getpwnam(name) for group in grp.getgrall() for name in group.gr_mem
                 if pwd.getpwnam(name).pw_gid != group.gr_gid), None)
    if user is not None:
        assert groups_of(user.pw_uid, user.pw_gid) >= set(os.getgrouplist(user.pw_name, user.pw_gid))
    assert groups_of(987654, 5) == {5}      # nobody of that number


def test_the_refusal_says_why() -> None:
    with pytest.raises(PermissionError, match=r"uid 1000 may not open udp 10\.0\.0\.1 port 53: ports under 1024"):
        Access(OWNER, []).demand(OWNER, OWNER, "udp", "10.0.0.1", 53)
    with pytest.raises(PermissionError, match=r"uid 2000 may not open connect 192\.0\.2\.1 port 80: no \[\[access"):
        Access(OWNER, []).demand(OTHER, OTHER, "connect", "192.0.2.1", 80)
    with pytest.raises(PermissionError, match=r"uid 2000 may not open raw any protocol: no \[\[access\]\] rule"):
        Access(OWNER, []).demand(OTHER, OTHER, "raw")
