"""Faults on purpose, longer than the tests: ``make torture`` (see ``__main__``)."""
