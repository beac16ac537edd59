"""Floor 2: protocol control blocks and the table that finds them."""
