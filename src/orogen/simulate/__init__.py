"""What a run costs, from its config alone; touches no array."""
