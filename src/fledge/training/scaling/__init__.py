"""Scaling laws from small runs: power laws fitted, carried on to a larger run with an interval, and checked there."""
