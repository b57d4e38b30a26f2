"""Operations of `curate`. Each reads a table of the episodes and drops some."""
