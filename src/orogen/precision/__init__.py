"""Which numbers are kept in which format."""
