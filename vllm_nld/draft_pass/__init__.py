"""Filling a block: bidirectional forwards, which positions each commits, and which tokens."""
