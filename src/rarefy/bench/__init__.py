"""Benchmarks that the command line runs (``rarefy bench``), and the peers they run beside: no part of the library."""
