"""What a run writes: files, tables, pictures and pages."""
