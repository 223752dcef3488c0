"""Building blocks of layers. Every parameter is created by `layers.parameter`, with its logical axis names."""
