"""For operators of a server: counts, metrics, and replicas on Ray."""
