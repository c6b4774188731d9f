"""From files to token ids and labels: formats, templates, masking, packing, collation."""
