"""Auto mode: which requests draft, and how far, by measured cost and acceptance. Pure Python."""
