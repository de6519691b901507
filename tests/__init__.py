"""The tests. They are a package so that they can import shared code (``tests.support``)."""
