"""LoRA through PEFT: targets, injection, what is trainable."""
