"""How images reach a language model."""

# Extras of batches with images. FEATURES (b, t, m, v) float32: the feature vectors of a row's images, one image after
# another, m of them at each position, so that the batch is split over devices as its tokens are. IMAGE (b, t) int32:
# the image of the row, 1, 2, …, that each token sees, 0 for none.
FEATURES, IMAGE = "image_features", "image"
