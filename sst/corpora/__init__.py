"""Where images come from: one module per source, each giving what `sst.corpora.packing` packs."""
