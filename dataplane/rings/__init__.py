"""Floor 2: the rings between processes, and the wake objects beside them."""
