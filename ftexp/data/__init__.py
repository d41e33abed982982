"""Data: sources (what there is), order (which sample when), feeds (how rows reach a worker), augmentation."""
