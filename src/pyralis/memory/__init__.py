"""The memory plan: which activations and weights are kept, recomputed or offloaded, layer by layer."""
