"""Feeds the readers damaged and hostile files, by seed: `python -m tests.fuzz --cases 10000 --seed 1`."""
