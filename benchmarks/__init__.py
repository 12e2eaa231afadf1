"""Speed beside PyTorch, measured in one run."""
