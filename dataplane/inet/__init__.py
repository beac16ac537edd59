"""Floor 4: the protocols from the IP layer up, and demultiplexing, as an RX worker runs them."""
