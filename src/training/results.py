"""Results of evaluations as a pandas table: ``training.results.load("logs")``."""

from training.eval.results import load

__all__ = ["load"]
