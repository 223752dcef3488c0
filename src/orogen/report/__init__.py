"""What a run reports: the metrics of each step as it trains, pictures of them, and one page."""
