"""Training: first keypoints, rounds of labels, and the two stages."""
