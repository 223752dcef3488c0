"""Text in, packed batches out: sources, corpora, tokenizer, packing, loader. Imports only `orogen.config`."""
