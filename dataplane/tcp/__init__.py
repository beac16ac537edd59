"""Floor 2: TCP itself, without sockets, packets or clocks.

Segments, the application's wishes and the time go in; segments to send and the time of the next call come out.
All functions have the form f(mem, x, ...), where `x` is the place of an exchange block (shm/layout_tcp.py, X_...):
memory of the caller's own with a copy of the connection's control block in it. Whoever holds the connection's lock
runs them through `service`: the RX worker, the consumer, or the continuation worker.
"""
