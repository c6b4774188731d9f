"""Configs, the training run and its report."""
