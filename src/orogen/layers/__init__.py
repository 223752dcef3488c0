"""The only place a parameter is made: each is born with its logical axis names."""
