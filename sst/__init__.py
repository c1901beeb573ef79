"""Self-training of object landmarks: corpora, keypoints, network, losses, stages, scoring and pictures."""
