"""What `import training` offers: models by name, with their transforms and tokenizer, and saving them."""

from training.model.config import register_model_configs
from training.model.factory import create_model, create_model_and_transforms, get_tokenizer
from training.model.saving import save_pretrained

__all__ = ["create_model", "create_model_and_transforms", "get_tokenizer", "save_pretrained"]

register_model_configs()
