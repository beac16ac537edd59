"""The pictures of docs/performance.md, drawn by matplotlib into SVG files.

Each picture takes what it shows from the results by key. One for which nothing was measured is not drawn; a peer that
is missing is left out. The same results give the same files, byte by byte.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from bench.suite import RING_PEERS, RINGS, SOCKETS, Figures, Unmeasured
from bench.usl import Fit

OURS, PEER, THIRD, GREY = "#1f5fa8", "#9aa5b1", "#c2571a", "#59636e"
NAMES = {"faster_fifo": "faster-fifo", "queue": "multiprocessing.Queue", "pipe": "multiprocessing.Pipe",
         "zmq": "ZeroMQ", "dpdk": "DPDK rte_ring"}

STYLE: Any = {
    "font.family": "sans-serif", "font.size": 10, "axes.titlesize": 10.5, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY, "axes.labelcolor": GREY,
    "xtick.color": GREY, "ytick.color": GREY, "axes.grid": True, "grid.color": "#e6e8eb", "grid.linewidth": 0.8,
    "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 1.8, "lines.markersize": 5,
    "svg.fonttype": "none", "svg.hashsalt": "dataplane", "figure.facecolor": "white", "savefig.facecolor": "white",
}


def _some(figures: Figures, key: str, name: str = "median") -> Any:
    """The value, or None."""
    with contextlib.suppress(Unmeasured):
        return figures.of(key, name)
    return None


def _short(value: float) -> str:
    """1.2k, 34, 0.05."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.3g}"


def _plain(axis: Any) -> None:
    """Logarithmic, with plain numbers."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axis.set_minor_formatter(NullFormatter())


def _bars(axes: Axes, figures: Figures, keys: dict[str, str], title: str, unit: str) -> None:
    """Horizontal bars in a logarithmic scale, each with its figure; ours in colour. keys: label by key."""
    found = [(label, value, key.rpartition(".")[2] not in _FOREIGN) for key, label in keys.items()
             if (value := _some(figures, key)) is not None]
    if not found:
        raise Unmeasured(title)
    labels, values, own = zip(*found, strict=True)
    places = range(len(found))
    low = min(values) / 3
    axes.barh(places, [value - low for value in values], left=low, height=0.62,
              color=[OURS if mine else PEER for mine in own])
    axes.set_xscale("log")
    axes.set_xlim(low, max(values) * 3)
    for place, value in zip(places, values, strict=True):
        axes.text(value * 1.08, place, _short(value), va="center", color=GREY, fontsize=9)
    axes.set_yticks(places, labels)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_title(title)
    axes.set_xlabel(unit)
    _plain(axes.xaxis)


_FOREIGN = {*RING_PEERS, "kernel", "recvmmsg", "asyncio"}


def _curve(axes: Axes, figures: Figures, points: Sequence[tuple[float, str]], label: str, color: str,
           scale: Callable[[float], float] = float, **style: Any) -> None:
    """Those of the points that were measured: (x, key)."""
    found = [(x, scale(value)) for x, key in points if (value := _some(figures, key)) is not None]
    if found:
        axes.plot(*zip(*found, strict=True), color=color, label=label, **{"marker": "o", **style})


def _from_zero(axes: Axes) -> None:
    """The vertical axis, with room above the highest line."""
    axes.set_ylim(0, 1.1 * max(float(np.max(line.get_ydata())) for line in axes.lines))


@contextlib.contextmanager
def _panels(count: int, height: float, width: float = 8.6) -> Iterator[tuple[Figure, list[Axes]]]:
    figure, panels = plt.subplots(1, count, figsize=(width, height), squeeze=False, layout="constrained")
    try:
        yield figure, list(panels[0])
    finally:
        plt.close(figure)


# -- one function for each picture: what it returns is saved -----------------------------------------------------


def ring(figures: Figures, save: Callable[[Figure], None]) -> None:
    """Items and records against peers."""
    with _panels(2, 3.3) as (figure, (left, right)):
        names = {peer: NAMES.get(peer, peer) for peer in RING_PEERS}
        for axes, key, title in ((left, "ring.items", "8-byte items, batches of 32"),
                                 (right, "ring.record.256", "records of 256 bytes, batches of 32")):
            _bars(axes, figures, {key: "dataplane", **{f"{key}.{peer}": name for peer, name in names.items()}},
                  title, "million a second (logarithmic)")
        save(figure)


def client(figures: Figures, save: Callable[[Figure], None]) -> None:
    """All ways of taking packets from a socket."""
    with _panels(1, 3.4) as (figure, (axes,)):
        _bars(axes, figures, {
            "client.consume": "consume", "client.recv_batch": "recv_batch, NumPy",
            "client.async": "async for, NumPy", "client.payloads": "batches, each payload",
            "client.recvfrom": "recvfrom", "client.recv_batch.recvmmsg": "kernel UDP: recvmmsg, in C",
            "client.recvfrom.kernel": "kernel UDP: recvfrom", "client.async.asyncio": "kernel UDP: asyncio"},
            "one process, one UDP socket", "million packets a second (logarithmic)")
        save(figure)


def demux(figures: Figures, save: Callable[[Figure], None]) -> None:
    """Packets a second against sockets, and against packet sizes."""
    with _panels(2, 3.3) as (figure, (left, right)):
        _curve(left, figures, [(n, f"demux.{n}") for n in SOCKETS], "dataplane", OURS)
        _curve(left, figures, [(n, f"demux.{n}.dpdk") for n in SOCKETS], "DPDK", PEER)
        left.set_xscale("log")
        left.set_xlabel("sockets")
        _plain(left.xaxis)
        sizes = {"60": "1024", "576": "size.576", "1500": "size.1500"}
        _curve(right, figures, [(int(size), f"demux.{key}") for size, key in sizes.items()], "dataplane", OURS)
        _curve(right, figures, [(int(size), f"demux.{key}.dpdk") for size, key in sizes.items()], "DPDK", PEER)
        right.set_xlabel("bytes of a packet; 1,024 sockets")
        for axes, title in ((left, "60-byte packets"), (right, "packet sizes")):
            if not axes.lines:
                raise Unmeasured("demux")
            _from_zero(axes)
            axes.set_title(title)
            axes.set_ylabel("Mpps, one core")
        left.legend()
        save(figure)


def cost(figures: Figures, save: Callable[[Figure], None]) -> None:
    """Nanoseconds for a packet against the table's and the rings' size."""
    with _panels(2, 3.3) as (figure, (left, right)):
        wildcard = [(n, f"demux.{n}") for n in SOCKETS if n <= 1024]
        connected = [(1024, "demux.connected"), *((n, f"demux.{n}") for n in SOCKETS if n > 1024)]
        _curve(left, figures, wildcard, "bound to a port", OURS, lambda rate: 1e3 / rate)
        _curve(left, figures, connected, "connected", THIRD, lambda rate: 1e3 / rate)
        left.set_title("sockets in the table")
        left.set_xlabel("sockets")
        _curve(right, figures, [(size / 1024, f"scaling.ring.{size}") for size in RINGS], "", OURS)
        right.set_title("size of a ring, 64 sockets, the running dataplane")
        right.set_xlabel("KiB")
        for axes in (left, right):
            if not axes.lines:
                raise Unmeasured("cost")
            axes.set_xscale("log")
            _plain(axes.xaxis)
            _from_zero(axes)
            axes.set_ylabel("ns a packet")
        left.legend()
        right.set_xticks([size / 1024 for size in RINGS], [f"{size >> 10:,}" for size in RINGS])
        right.xaxis.set_minor_locator(NullLocator())
        save(figure)


def overload(figures: Figures, save: Callable[[Figure], None]) -> None:
    """Delivered against offered load."""
    offered, delivered = figures.of("overload.flood", "offered_kpps"), figures.of("overload.flood", "delivered_kpps")
    with _panels(1, 3.2, 6.2) as (figure, (axes,)):
        axes.plot(offered, offered, color=PEER, linestyle="--", linewidth=1.2, label="offered")
        axes.plot(offered, delivered, color=OURS, marker="o", label="delivered")
        axes.set_xscale("log")
        axes.set_ylim(0, max(delivered) * 1.25)
        axes.set_xlabel("offered to one socket, thousand packets a second (logarithmic)")
        axes.set_ylabel("thousand a second")
        axes.set_title("a consumer that takes some microseconds for a packet")
        _plain(axes.xaxis)
        axes.legend(loc="lower right")
        save(figure)


PERCENTILES = ("p50", "p90", "p99", "p99.9", "p99.99")


def latency(figures: Figures, save: Callable[[Figure], None]) -> None:
    """Percentiles, against the raw round trips."""
    with _panels(2, 3.2) as (figure, panels):
        for axes, mode, title in zip(panels, ("busy", "sleeping"), ("consumer spinning", "consumer asleep"),
                                     strict=True):
            for key, label, color in ((f"latency.{mode}", "dataplane", OURS),
                                      (f"latency.{mode}.raw", "half a raw round trip", PEER)):
                values = [figures.of(key, name) for name in PERCENTILES]
                axes.plot(range(len(values)), values, color=color, marker="o", label=label)
            axes.set_yscale("log")
            axes.set_xticks(range(len(PERCENTILES)), [name[1:] for name in PERCENTILES])
            axes.set_xlabel("percentile")
            axes.set_ylabel("µs (logarithmic)")
            axes.set_title(title)
            _plain(axes.yaxis)
        panels[0].legend()
        save(figure)


def scaling(figures: Figures, save: Callable[[Figure], None]) -> None:
    """Throughput against RX workers: measured, and the law up to 64."""
    rates, law = figures.of("scaling", "Mpps"), figures.of("scaling", "usl")
    most = int(figures.of("scaling", "predicted_workers"))
    low, _, high = figures.of("scaling", "predicted_Mpps")
    fit = Fit(law["rate"], law["sigma"], law["kappa"], tuple(law["free"]), {})
    with _panels(2, 3.3) as (figure, panels):
        measured = max(int(n) for n in rates)
        for axes, end in zip(panels, (max(4, measured), most), strict=True):
            numbers = [1 + i * (end - 1) / 200 for i in range(201)]
            axes.plot(numbers, [fit.rate * n for n in numbers], color=PEER, linestyle="--", linewidth=1.2,
                      label="without any loss")
            axes.plot(numbers, [fit.at(n) for n in numbers], color=OURS, linewidth=1.2, label="the law, fitted")
            points = [(int(n), rate) for n, some in rates.items() for rate in some]
            axes.plot(*zip(*points, strict=True), "o", color=OURS, label="measured")
            axes.set_xlim(0, end * 1.03)
            axes.set_ylim(0, fit.rate * end * 1.05)
            axes.set_xlabel("RX workers")
            axes.set_ylabel("Mpps")
        separate = [(int(n), rate) for n, some in (_some(figures, "scaling.separate", "Mpps") or {}).items()
                    for rate in some]
        if separate:
            panels[0].plot(*zip(*separate, strict=True), "x", color=THIRD, label="separate dataplanes, measured")
        panels[1].vlines(most, low, high, color=OURS, linewidth=4, alpha=0.35,
                         label="fitted to the worst and the best turn")
        panels[0].set_title("what was measured")
        panels[1].set_title("what the law says beyond (not measured)")
        panels[0].legend(fontsize=9)
        panels[1].legend(*_only(panels[1], "fitted to the worst and the best turn"), fontsize=9, loc="upper left")
        save(figure)


def _only(axes: Axes, label: str) -> tuple[list[Any], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    return [handles[labels.index(label)]], [label]


PICTURES = {"ring": ring, "client": client, "demux": demux, "cost": cost, "overload": overload, "latency": latency,
            "scaling": scaling}


def draw(figures: Figures, directory: Path) -> None:
    """All pictures as DIRECTORY/NAME.svg."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, function in PICTURES.items():
        target = directory / f"{name}.svg"

        def save(figure: Figure, target: Path = target) -> None:
            figure.savefig(target, metadata={"Date": None})

        try:
            with plt.rc_context(STYLE):
                function(figures, save)
        except Unmeasured as missing:
            print(f"{name}.svg was not drawn: {missing}")
