"""Measurements of Pyralis against its peers and against what the GPU can do."""
