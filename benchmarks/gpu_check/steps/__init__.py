"""One module per step, each with ``run(check)``; :mod:`gpu_check.plan` lists them."""
