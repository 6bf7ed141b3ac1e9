"""Training: stages, the contrastive step, checkpoints and the loop."""
