"""Code that tests share: models, engines, clusters, and requirements on the machine."""
