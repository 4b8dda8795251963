"""Released checkpoints: making bundles, fetching them, and checking every byte, tensor and number of them."""
