"Training: prompts, checkpoints, the trainer, and what a run costs."
