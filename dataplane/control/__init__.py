"""Floor 3: the control socket between consumers, command line and supervisor."""
