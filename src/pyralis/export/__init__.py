"""From a trained adapter to folders other programs load."""
