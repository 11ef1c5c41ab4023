"""Generated data: vectorised generators and the TFDS builders around them."""
