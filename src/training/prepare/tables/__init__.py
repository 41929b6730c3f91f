"""`prepare tables`: converts published caption tables to clean Parquet files."""
