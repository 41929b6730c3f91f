"""What a model's name means: its config, its folder and its weights file."""
