"""The micro-step: eager and graphed."""
