"""What travels with a checkpoint: configurations, models, processors, prompts, segmentation and the pipeline."""
