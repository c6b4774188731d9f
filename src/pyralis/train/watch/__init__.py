"""Steps that are not finite: found, kept, run again."""
