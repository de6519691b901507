"""What the tests share: models, engines, clusters, and what a machine must have."""
