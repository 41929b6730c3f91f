"""Models. `names`: configs and files; `tokenizers`; `weights`; `packing`; `towers`; `assembly` combines them."""
