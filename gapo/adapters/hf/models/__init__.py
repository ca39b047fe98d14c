"""Questions to a transformers model, and what is changed on it for the time of a training."""
