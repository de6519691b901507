"""What every Python process of the tests runs first (``tests/conftest.py`` puts this folder on ``PYTHONPATH``).

Importing vLLM makes millions of objects and no garbage, and looking for it takes a fifth of 13 seconds. The tests start
over fifty processes that import it.
"""

import gc

gc.set_threshold(200_000)
