"""Text in, packed batches out: readers, corpora, stores, tokenizer, packing, batches. Imports only `orogen.config`.

`DataConfig.corpus` names a file or folder of `.txt`, `.jsonl`, Parquet, WARC or WET, plain or in .gz, .xz or .zst, or
of ArrayRecord (links to folders are counted, not followed). A document is a `.txt` file, a line, a row (field `text`,
or `DataConfig.text_field`), a record of plain text, or the main text of an HTML page (`warc.py`; `pip install
'orogen[warc]'`). Documents are split into train, held-out and tuning by a hash of their names, divided into pieces of
at most the sequence length, which overlap by one token so that every token is predicted exactly once, and packed
best-fit (arXiv:2404.10830). Attention, convolution windows, SSM states and MTP shifts stop at document boundaries.

Tokenizers are byte-level, or SentencePiece-like with byte fallback. One that changes text (by a normalizer, or because
it lacks a token for some byte) works for `generate` but not for `train`, whose bits per byte would be those of another
text.

**A small corpus is read into memory**, and refused at the first record that cannot be used. **A large one becomes a
store**: `orogen tokenize --gin_file F --out DIR`, then the same files with `DataConfig.corpus = 'DIR'` give the same
batches, by memory map. Units of 4 to 256 MB are tokenized on any number of processes; a kill loses at most the units in
work, and neither it nor the number of processes changes a byte. What cannot be used is left out, counted, and named in
`DIR/broken.jsonl`. Corpora that are tokens already, in ArrayRecord or in Megatron's `.bin` and `.idx` (`tokenized.py`),
become stores the same way; `DataConfig.tokenizer` then is the path of the tokenizer that made them. A store is read
only once its manifest is there. `indexed.py` says why its files are Megatron's; experiments/corpora measures it.

**Blends and phases** (`blend.py`): `DataConfig.sources` names several corpora with weights, by tokens seen, and caps on
epochs; `TrainConfig.phases` changes weights, sequence length, batch size or learning rate at a step, and
`TrainConfig.batch_ramp` lets the batch grow. Each row is taken from the source that is furthest behind its share, so
shares are exact to a few rows at every step. Documents are shuffled as a whole within each source. Phases count the
steps of training, also after a roll-back. Where the sequence length changes, the rest of each source's window (2**19
tokens, or an epoch if that is shorter) is not read. `gin_configs/data/mt_nlg.gin` and
`gin_configs/recipes/nemotron3_nano.gin` are published blends.
"""
