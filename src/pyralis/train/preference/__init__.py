"""Training on preferences: DPO and its kin."""
