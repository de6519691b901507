"""This tier computes on one core, except for the processes that it starts."""

from tests.support.threads import one_thread as one_thread
