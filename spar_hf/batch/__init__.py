"""Many images: features, masks and teacher maps, by callables of Ray Data, `datasets` and Spark, and as files."""
