"""Floor 4: what a consumer process uses. See docs/client.md; the public names are in `dataplane` itself."""
