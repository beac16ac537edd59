"""The processes of a running dataplane: supervisor, RX and continuation workers, ready-made consumers."""
