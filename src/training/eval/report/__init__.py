"""Reports of an evaluation: curves, ranks of each query, and one HTML page. It works on features, never on a model."""
