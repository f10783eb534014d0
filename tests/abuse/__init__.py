"""What tries to break the promises, one module per promise; each runs alone, for as long as it is told.

    PYTHONPATH=tests python -m abuse.MODULE --help

The tests `test_abuse_*.py` run a minute's worth of each; `make reliability` runs all of them whole, and writes
docs/RELIABILITY.md from what they found.
"""
