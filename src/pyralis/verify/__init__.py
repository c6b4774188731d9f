"""Stock transformers against the fast layers on the user's own model and machine, both against float64."""
