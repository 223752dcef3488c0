"""What a run leaves for its reader: the numbers of each step as they are made, pictures of them, and one page."""
