"""`FastLanguageModel` and friends: what a person at a Python prompt, or a script written for Unsloth, calls."""
