"""Memory and speed of the released models, on paper."""
