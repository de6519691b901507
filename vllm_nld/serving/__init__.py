"""What operators of a server see: counts, metrics, and replicas on Ray."""
