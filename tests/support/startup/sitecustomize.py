"""What every Python process of the tests runs first (``tests/conftest.py`` puts this folder on ``PYTHONPATH``).

The tests start over fifty processes that import vLLM. Each makes millions of objects and no garbage, and looking for it
takes a fifth of 13 seconds. And each imports transformers, which reads its thousands of files for the names in them,
twice: another second. At its end each would free all its objects one by one, which takes three to seven seconds.
"""

import atexit
import contextlib
import gc
import importlib.machinery
import os
import pickle
import sys
from pathlib import Path

gc.set_threshold(200_000)


def leave_all_to_the_system(freeze=gc.freeze):  # which some tests replace
    """Let the interpreter end without a search for garbage. Runs after nearly all other exit functions.

    Compiled modules then report leaks, so what is written to stderr from here on is lost. Exit statuses do not change.
    """
    sys.stderr.flush()
    freeze()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


atexit.register(leave_all_to_the_system)  # nearly the first one registered, so nearly the last to run


class NamesReadOnce:
    """Finds the module of transformers that reads names, and has it keep them in the environment's folder."""

    def find_spec(self, name, path=None, target=None):
        if name != "transformers.utils.import_utils":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            if hasattr(module, "define_import_structure"):  # not in every version
                module.define_import_structure = self.once(module.define_import_structure)

        spec.loader.exec_module = exec_module
        return spec

    @staticmethod
    def once(read):
        """Return ``read`` with its answers about the folder of all models in a file, until that folder changes."""

        def define_import_structure(module_path, prefix=None):
            folder = Path(str(module_path).removesuffix("__init__.py"))
            if folder.name != "models":
                return read(module_path, prefix)  # one model's folder
            key = str(folder), folder.stat().st_mtime_ns
            file = Path(sys.prefix, f"transformers-names-{prefix}.pickle")
            if file.exists():
                known, names = pickle.loads(file.read_bytes())
                if known == key:
                    return names
            names = read(module_path, prefix)
            with contextlib.suppress(OSError):  # an environment that this user may not change
                made = file.with_suffix(f".{os.getpid()}")
                made.write_bytes(pickle.dumps((key, names)))
                made.replace(file)
            return names

        return define_import_structure


sys.meta_path.insert(0, NamesReadOnce())
