"""Operations that have more than one implementation: a folder each, the implementation chosen by name."""
