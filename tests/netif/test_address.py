"""Addresses in settings, in the netif queue and on the kernel's side; what `check` refuses."""

from __future__ import annotations

import ipaddress
import mmap

import numpy as np
import pytest

from dataplane import netif
from dataplane.config import parse
from dataplane.errors import ConfigError
from dataplane.netif import _address, tun
from dataplane.shm import layout as L

TUN = 'name = "x"\n[[netif]]\nkind = "tun"\ndevice = "dpt-none0"\n'
LO = 'name = "x"\n[[netif]]\nkind = "af_packet"\ndevice = "lo"\n'


@pytest.mark.parametrize(("ours", "host"), [
    (["10.77.0.1/24", "fd77::1/64"], ["10.77.0.2/24", "fd77::2/64"]),
    (["10.77.0.1/24", "10.77.0.2/24"], ["10.77.0.3/24"]),       # one for each network, of those that are free
    (["10.77.0.254/24"], ["10.77.0.1/24"]),                     # behind the last one comes the first one
    (["10.77.0.1/30"], ["10.77.0.2/30"]),
    (["10.77.0.0/31"], ["10.77.0.1/31"]),                       # RFC 3021: both are hosts
    (["10.77.0.1/32", "fd77::1/128"], []),
    (["10.77.0.1/30", "10.77.0.2/30"], []),
    (["fd77::1/127"], ["fd77::/127"]),                          # RFC 6164
    ([], []),
])
def test_the_kernel_gets_the_next_free_address(ours: list[str], host: list[str]) -> None:
    assert list(_address.host_addresses(ours)) == host


def test_the_netif_queue_gets_addresses_and_gateways() -> None:
    settings = tun.Settings(device="x", addresses=("10.77.0.1/24", "fd77::8000:0:0:1/64"),
                            gateway=("10.77.0.9", "fd77::9"))
    nif = np.zeros(L.N_BYTES // 8, np.int64)
    _address.fill(nif, settings)
    assert nif[L.N_ADDRESS_COUNT // 8] == 2 and nif[L.N_FLAGS // 8] == 0
    first, second = (nif[(L.N_ADDRESSES + i * L.ADDRESS_BYTES) // 8:][:4].tolist() for i in range(2))
    assert first == [4, 24, 0, 0x0A4D0001]
    assert second[:2] == [6, 64]
    low = int(ipaddress.ip_address("fd77::8000:0:0:1")) & (1 << 64) - 1
    assert [value % (1 << 64) for value in second[2:]] == [0xFD77 << 48, low]
    assert nif[L.N_GATEWAY4 // 8] == 0x0A4D0009
    assert (int(nif[L.N_GATEWAY6_HI // 8]) % (1 << 64), nif[L.N_GATEWAY6_LO // 8]) == (0xFD77 << 48, 9)


def test_without_addresses_it_is_passive() -> None:
    nif = np.zeros(L.N_BYTES // 8, np.int64)
    _address.fill(nif, tun.Settings(device="x"))
    assert nif[L.N_FLAGS // 8] == L.NF_PASSIVE and nif[L.N_ADDRESS_COUNT // 8] == 0


def test_good_settings_pass() -> None:
    parse(TUN + 'addresses = ["10.77.0.1/24"]\ngateway = ["10.77.0.2"]\n', netif.kinds())
    parse(LO + f"block_bytes = {mmap.PAGESIZE * 32}\n", netif.kinds())


@pytest.mark.parametrize(("text", "key", "words"), [
    (TUN + 'addresses = ["127.0.0.1/8"]', "netif[0].addresses[0]", "already taken by interface lo"),
    (TUN + 'addresses = ["10.7.0.1/24"]\nhost_addresses = ["127.0.0.1/8"]', "netif[0].host_addresses[0]", "taken"),
    (TUN + 'addresses = ["10.7.0.1/24"]\nhost_addresses = ["10.7.0.1/24"]', "netif[0].host_addresses[0]",
     "not in `addresses`"),
    (TUN + 'addresses = ["10.7.0.1/24"]\ngateway = ["10.8.0.1"]', "netif[0].gateway[0]", "in a network of"),
    (TUN + 'addresses = ["10.7.0.1/24"]\ngateway = ["10.7.0.1"]', "netif[0].gateway[0]", "another host's"),
    (TUN + 'addresses = ["10.7.0.1/24"]\ngateway = ["10.7.0.2", "10.7.0.3"]', "netif[0].gateway[1]", "one gateway"),
    (TUN + "mtu = 1000\n" + 'addresses = ["fd77::1/64"]', "netif[0].mtu", "1280"),
    (TUN.replace("dpt-none0", "lo"), "netif[0].device", "exists already"),
    (TUN.replace('"tun"', '"tap"') + "mtu = 65535", "netif[0].mtu", "65521"),
    (TUN.replace("dpt-none0", "sixteen-letters-"), "netif[0].device", "15 characters"),
    (LO.replace('"lo"', '"dpt-none0"'), "netif[0].device", "there is none of this name"),
    (LO + "block_bytes = 131073", "netif[0].block_bytes", "multiple of the page size"),
    (LO + "blocks = 1", "netif[0].blocks", "2"),
])
def test_bad_settings_are_named(text: str, key: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, netif.kinds())
    assert caught.value.key == key
    assert words in str(caught.value)
