"""Standard-library modules that the embedded checkpoint was not trained on, and prompts cut from them.

Training (which leaves them out), evaluation, the demo and the tests use one list.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

HELD_OUT_MODULES = (
    "argparse.py",
    "bisect.py",
    "calendar.py",
    "cmd.py",
    "configparser.py",
    "csv.py",
    "dis.py",
    "email/message.py",
    "fractions.py",
    "ftplib.py",
    "graphlib.py",
    "heapq.py",
    "http/cookies.py",
    "json/decoder.py",
    "logging/config.py",
    "mailbox.py",
    "netrc.py",
    "optparse.py",
    "pprint.py",
    "queue.py",
    "sched.py",
    "shelve.py",
    "statistics.py",
    "textwrap.py",
    "unittest/mock.py",
    "urllib/robotparser.py",
    "wsgiref/handlers.py",
    "xmlrpc/client.py",
    "zipfile.py",
)


def held_out_prompts(count: int, characters: int = 600) -> list[tuple[str, str]]:
    """Return ``count`` pairs (module, text): prompts that end at a line's end inside held-out modules.

    The cuts are spread evenly over each module, so the same call gives the same prompts on the same Python.

    Args:
        count: number of prompts; modules are taken in turn.
        characters: approximate prompt length.
    """
    root = Path(sysconfig.get_path("stdlib"))
    modules = [name for name in HELD_OUT_MODULES if (root / name).is_file()]
    prompts = []
    for index in range(count):
        name = modules[index % len(modules)]
        text = (root / name).read_text(encoding="utf-8")
        lap = index // len(modules)
        start = int(len(text) * (0.2 + 0.6 * ((lap * 0.618 + index * 0.377) % 1.0)))
        start = text.find("\n", start) + 1
        # Without the line break: the tokenizer joins it to the next line's indentation.
        end = text.find("\n", start + characters)
        prompts.append((name, text[start : end if end >= 0 else None]))
    return prompts
