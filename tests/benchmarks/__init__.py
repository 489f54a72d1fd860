"""Benchmarks of kelib beside what one would do without it: ``python -m tests.benchmarks``."""
