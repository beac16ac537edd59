"""Entry points to the functions of tcp/ that only kernels call, under the same names: the rig's compiled mode."""

from __future__ import annotations

from dataplane.jit import kernel
from dataplane.tcp import connection as C
from dataplane.tcp import input as I
from dataplane.tcp import opening as O
from dataplane.tcp import reassembly as R
from dataplane.tcp import segment as G


@kernel("i64(mem, i64, i64, i64)")
def segment_parse(mem, at, length, s):
    return G.segment_parse(mem, at, length, s)


@kernel("i64(mem, i64)")
def segment_header_bytes(mem, o):
    return G.segment_header_bytes(mem, o)


@kernel("i64(mem, i64, i64, i64, i64)")
def segment_build(mem, o, at, seq, flags):
    return G.segment_build(mem, o, at, seq, flags)


@kernel("i64(mem, i64, i64, i64, i64)")
def reassembly_insert(mem, x, data_place, from_, to_):
    return R.reassembly_insert(mem, x, data_place, from_, to_)


@kernel("none(mem, i64, i64, i64)")
def reassembly_duplicate(mem, x, from_, to_):
    R.reassembly_duplicate(mem, x, from_, to_)


@kernel("none(mem, i64, i64)")
def reassembly_sacks(mem, x, o):
    R.reassembly_sacks(mem, x, o)


@kernel("none(mem, i64, i64, i64, i64)")
def conn_open_active(mem, x, mtu, ip_bytes, initial):
    O.conn_open_active(mem, x, mtu, ip_bytes, initial)


@kernel("none(mem, i64)")
def conn_establish(mem, x):
    O.conn_establish(mem, x)


@kernel("none(mem, i64, i64, i64)")
def tcp_arrive(mem, x, at, length):
    I.tcp_arrive(mem, x, at, length)


@kernel("none(mem, i64, i64, i64, i64)")
def tcp_control(mem, x, kind, value, seq):
    I.tcp_control(mem, x, kind, value, seq)


@kernel("none(mem, i64)")
def tcp_finish(mem, x):
    C.tcp_finish(mem, x)
