"""Output folders and checkpoints: whole or not there at all."""
