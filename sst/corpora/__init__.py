"""Where images come from: one module per source, each giving what `sst.packing` packs."""
