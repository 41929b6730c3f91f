"""`prepare tables`: published caption tables to clean Parquet files."""
