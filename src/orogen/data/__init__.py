"""Text in, packed batches out: sources, corpora, tokenizer, packing, loader. Imports only `orogen.config`.

`DataConfig.corpus` names a folder of `.txt`, or a file or folder of `.jsonl`, `.jsonl.gz`, `.jsonl.zst` or Parquet
(links to folders are counted, not followed). A document is a `.txt` file, a line, or a row (field `text`, or
`DataConfig.text_field`). Documents are split into train, held-out and tuning by a hash of their names, divided into
pieces of at most the sequence length, which overlap by one token so that every token is predicted exactly once, and
packed best-fit (arXiv:2404.10830). Attention, convolution windows, SSM states and MTP shifts stop at document
boundaries.

Tokenizers are byte-level, or SentencePiece-like with byte fallback. One that changes text (by a normalizer, or because
it lacks a token for some byte) works for `generate` but not for `train`, whose bits per byte would be those of another
text.

Text and tokens of a corpus stay in memory.
"""
