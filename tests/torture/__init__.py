"""Runs that are killed, starved and broken on purpose, over and over: what they leave, and what goes on from it.

`python -m tests.torture` counts, and writes the counts into docs/reliability.md. Every run is the command line in a
process forked from this one, which has imported everything and started no thread, so that a run takes about a second.
"""
