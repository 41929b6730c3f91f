"""What an evaluation leaves to look at: curves, ranks by query, and one HTML page. Takes features, never a model."""
