"""Re-ViLM: captions of images by a language model whose knowledge lies in a database (arXiv:2302.04858).

A frozen vision model (`encoder.py`: CLIP's or SigLIP's from a folder, or EfficientNet-Lite0 from a wheel:
`efficientnet_lite0`) turns an image into feature vectors and one embedding. A perceiver resampler
(`model/resampler.py`) makes a few vectors of the features, and layers `x` of the pattern (`model/cross_attention.py`)
attend to them: each token to the latest image before it in its document. `x` and `g`, a tanh-gated MLP, begin as the
identity, so they can be inserted into a trained language model and trained alone:

    orogen graft --checkpoint runs/text --gin_file captioner.gin --out grafted      # ModelConfig with x and g inserted
    orogen database build captions --input pairs.tar --encoder CLIP_FOLDER
    orogen train --checkpoint grafted --gin_file captioning.gin --run runs/captioner
    orogen caption --checkpoint runs/captioner --database captions --image photo.jpg

where captioning.gin has a run's usual parts and

    OptimizerConfig.trained = ('x', 'g', 'resampler')
    VisionConfig.encoder = 'CLIP_FOLDER'
    VisionConfig.features = 'features'        # a folder; each image of the corpus is encoded once
    VisionConfig.images_per_row = 8
    VisionConfig.database = 'captions'
    VisionConfig.retrieved = 2

**Retrieval** (`database.py`, `retrieval.py`): entries are found by the cosine of the images' embeddings, exactly or by
faiss. With `VisionConfig.retrieval = 'prepended'` the captions found come before the caption to be written, as text;
with `'encoded'`, `ModelConfig.retrieved_captions` and `caption_tokens`, a small encoder (`model/resampler.py`) makes
vectors of each, as RETRO does of chunks, and layers `x` attend to them beside the image's. Adding or removing an entry
changes answers at once. For examples of the train split the copy guard leaves out near-copies of the image and captions
equal to the example's own: otherwise the model learns to copy. A database records its encoder and refuses another. A
change writes the whole database anew. An index is rebuilt with it, except that an HNSW one grows by what is added;
faiss takes nothing out of it, so that removing entries rebuilds it too (`index.py`). One process changes a database at
a time.

**Few-shot examples** (`VisionConfig.shots`): the most similar pairs of the train split stand before an example, the
most similar last. For captions they come from a corpus, `orogen caption --examples CORPUS`: a database has embeddings,
but not the features of images that examples need.

**Answers** (`answers.py`): `orogen generate --image FILE` and, of a captioner, chats of `orogen serve` whose messages
have images as data: URLs. What was said stands one after another as in training, without a chat template; an image
alone asks for its caption. A captioner answers beside the engine, one chat after another, by the likeliest tokens; what
asks for others (a temperature, tools, several choices) is refused. The weights are in memory twice.

**Batches** (`corpus.py`, `data/images.py`): in a token stream an image is one token; packing therefore knows nothing of
images. Packed batches get extras (`config/vision.py`) whose numbers lie along the time axis, so that every plan splits
them as it splits tokens. A document is padded until no row can have more than `images_per_row` images. The resampler
runs on a row's whole room, of `images_per_row` images unless a row has more tokens than an image has numbers
(`data/images.py`); costs and predictions leave its work out. `orogen verify` puts random images into its batches if the
pattern has `x`, and opens the gates, which let no gradient through while they are closed.

**Broken images** are left out and counted (`env.json`, `features/*/documents.json`); of an animation the first frame is
used; CMYK, palettes, 16 bits and transparency become RGB (`transforms.py`).
"""
