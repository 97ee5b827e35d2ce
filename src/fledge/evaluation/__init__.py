"""Evaluation: what a model can do, with intervals; the stage `evaluate`; the report of a run."""
