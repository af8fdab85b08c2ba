"""From a manifest to batches: index, plan, reading, augmentation, masks, loaders."""
